"""What the built-in model knows about using the app, and why things happen in it."""

from __future__ import annotations

import random

from assets.training.items import Item, draw_fact

_HOW = (
    "(How do I|How can I|How to|How would I|Where do I|Where can I|Can I|I want to|Tell me how to|"
    "Please show me how to|What do I press to|Is there a way to|Is it possible to|I'd like to)"
)

HOW_TO: dict[str, tuple[tuple[str, ...], str]] = {
    "switch model": (
        (
            f"{_HOW} (switch|change|choose|pick|select|use|load|try|open|get|start) (the|a "
            "different|another|a bigger|a larger|a better|a new|some other|a smarter) model?",
            f"{_HOW} (talk to|chat with) (another|a bigger|a different|a better) model?",
            "(Where|Where exactly) (is|are) the (other|bigger|larger) (models|model|model list)?",
            "(Which|What) (other|bigger) models (are there|can I use|do you have)?",
        ),
        "Choose another model in the dropdown at the top and press Load. Its experts are then "
        "offloaded as far as your memory requires.",
    ),
    "stop": (
        (
            f"{_HOW} (stop|cancel|interrupt|abort|end|halt) (an answer|the answer|you|the reply|a "
            "reply|the generation|the writing|this)?",
            "(You write too much|This is too long), how do I (stop|interrupt) (it|you|this)?",
            "(Where is|Is there) (the|a) stop button?",
        ),
        "Press the Stop button while the answer is being written. The part that is already there "
        "stays in the chat.",
    ),
    "retry": (
        (
            f"{_HOW} (retry|regenerate|redo|repeat|renew|get) (an answer|the answer|the last "
            "answer|a new answer|another answer|the reply|a reply)?",
            f"{_HOW} (try again|ask again|make you answer again|get a different answer|let you "
            "answer again)?",
            "(What does|What is) (the|) retry (button|) (do|for)?",
        ),
        "Press Retry under the answer. The model then writes a new answer to the same message.",
    ),
    "edit": (
        (
            f"{_HOW} (edit|change|correct|fix|rewrite) (my message|a message|my question|my last "
            "message|what I wrote|a typo in my message|an earlier message)?",
            "(I made a typo|I wrote something wrong)(.|,) (how do I|can I) (fix|edit|correct) it?",
            "(What does|What is) the edit button (do|for)?",
        ),
        "Press Edit on your message, change the text and send it again. The answer after it is "
        "written anew.",
    ),
    "new chat": (
        (
            f"{_HOW} (start|open|begin|make|create) a (new|fresh|second|clean) (chat|conversation|"
            "one)?",
            f"{_HOW} (clear|reset|empty) (the|this) (chat|conversation|context)?",
            f"{_HOW} (start over|begin again|start fresh)?",
        ),
        "Click New chat. It starts an empty conversation, and your old chats stay in the list.",
    ),
    "old chats": (
        (
            f"{_HOW} (find|open|see|continue|read|go back to|return to) (an old chat|my old chats|"
            "an earlier chat|earlier chats|a previous conversation|my history|the chat history)?",
            "Where (are|is) (my old chats|my chats|my earlier chats|the chat history|my history|"
            "the list of chats)?",
        ),
        "Your earlier chats are in the list on the left. Click one to open it and go on where you "
        "stopped.",
    ),
    "rename": (
        (
            f"{_HOW} (rename|name|retitle|change the name of|give a new name to) (a|my|this|the) "
            "(chat|conversation)?",
        ),
        "Find the chat in the list on the left, press Rename and type a new title.",
    ),
    "delete": (
        (
            f"{_HOW} (delete|remove|erase|get rid of) (a|my|this|an old|the) (chat|conversation)?",
            f"{_HOW} (delete|remove|erase) (my|all|all my|old|these) (chats|conversations|"
            "messages|data)?",
        ),
        "Find the chat in the list on the left and press Delete twice. Its text is then removed "
        "from this computer.",
    ),
    "dark mode": (
        (
            f"{_HOW} (turn on|switch on|enable|use|activate|get|switch to|turn off) (dark mode|"
            "the dark mode|dark colors|the dark theme|night mode|light mode|the light theme)?",
            "(Is there|Do you have|Does the app have) (a|) (dark|night|light) (mode|theme)?",
            "(It is|The screen is|The page is) too bright(.|,) (can you make it dark?|is there a "
            "dark mode?)",
        ),
        "Open the settings and choose the theme: System, Light or Dark. System follows your "
        "computer.",
    ),
    "where stored": (
        (
            "Where (are|is) (my|the|all|our) (chats|messages|data|conversations|chat|"
            "conversation) (stored|saved|kept)?",
            "Where do you (store|save|keep|put) (my|the) (chats|messages|data|conversations)?",
            "(Do|Will) (you|the app) (save|store|keep|remember) (my|our) (chats|messages|data|"
            "conversations)?",
        ),
        "Your chats are stored on this computer, in the data folder of the app. Nothing is sent "
        "to a server.",
    ),
    "privacy": (
        (
            "(Is|Are) (this|my data|my chat|it|this chat|the app|my messages) (private|safe|"
            "secret|secure|confidential)?",
            "(Can|Does|Will) (anyone|anybody|someone|somebody|the company|other people) (read|see|"
            "get) (my|our|these) (chats|messages|data|words)?",
            "(Do you|Does the app|Does PreScope) (send|share|upload|sell|collect) (my|any|"
            "anything of my) (data|messages|chats)?",
            "(Do you|Does the app) spy on me?",
        ),
        "Yes, it is private. The chat runs and stays on this computer, and nothing is sent away.",
    ),
    "internet": (
        (
            "(Do you|Does this app|Does the app|Does it|Does PreScope|Do I) need (the|an|) "
            "internet (connection|)?",
            "(Does this|Does it|Do you|Can I use this|Can you|Does the app) (work|run|chat) "
            "(offline|without internet|without a network|on a plane)?",
            "(Are you|Is this|Is the app) (online|connected to the internet|in the cloud|offline)?",
        ),
        "No internet is needed. The model and your chats are on this computer.",
    ),
    "slow start": (
        (
            "Why (is|was) (the first answer|the beginning|the start|the first word|the first "
            "token|it at first) (so|) slow?",
            "Why (does|did) (the first answer|the first word|it) take (so|this) long (at first|at "
            "the start|)?",
            "(The first answer|The start) (is|was) slow(.|,) why?",
        ),
        "At the start the cache is empty, so most experts must be copied first. After some tokens "
        "the hit rate goes up and the answer comes faster.",
    ),
    "faster": (
        (
            f"{_HOW} (make it|make you|make this|get it|make the app|make the answers) (faster|"
            "quicker|go faster|more quick|run faster)?",
            "(It is|You are|This is|The model is|The app is) (so|very|too|a bit) slow(. What can "
            "I do?|, what helps?|. Help!|. How do I speed it up?)",
            f"{_HOW} (speed it up|speed up the answers|get more speed|get more tokens per second|"
            "improve the speed|increase the speed)?",
            "What (makes|would make) (it|you|the model) faster?",
        ),
        "In the settings, keep more experts on the card. A smaller or quantized model is faster "
        "too, and so is closing other programs that use the graphics card.",
    ),
    "why slow": (
        (
            "Why (is|are) (it|you|this|the model|the app|this model|the answer) (so|that|this|) "
            "slow (today|now|)?",
            "Why (does it take|do you take|does the answer take) so long?",
            "(What makes|What is making) (it|you|the model|this) (so|) slow?",
        ),
        "Most of the time goes into copying experts over PCIe. When the hit rate is low there are "
        "many stalls, and the answer is slow.",
    ),
    "raise hit rate": (
        (
            f"{_HOW} (raise|increase|improve|get|reach) (the|my|a higher|a better) hit rate?",
            "Why is (the|my) hit rate (so|) (low|bad|small|poor)?",
            "(My|The) hit rate is (low|bad|only small|very low)(.|,) (why?|what can I do?|what "
            "helps?)",
        ),
        "A low hit rate means that the cache is too small for the experts in use. More slots help, "
        "and it also rises by itself as the cache warms up.",
    ),
    "why ram": (
        (
            "Why (do you|does the app|does PreScope|do we) (keep|store|hold|put) (the|most|all|so "
            "many|) experts in (RAM|main memory)?",
            "Why (are|do) (the|most|) experts (in|stay in|kept in|live in) RAM?",
            "Why (not|don't you) (keep|put|load) (all|all the|every) (experts|expert) (in|on|"
            "into) (the GPU|VRAM|the graphics card)?",
        ),
        "Because VRAM is too small for all experts of a big model. RAM is larger and cheaper, and "
        "each token needs only a few experts.",
    ),
    "requirements": (
        (
            "What (hardware|computer|graphics card|GPU|machine) do I need (for this|for this app|"
            "for bigger models|)?",
            "(Do I need|Does it need|Must I have) a (graphics card|GPU|fast computer|big computer|"
            "good GPU)?",
            "(Can I run this|Does this run|Will it run) (without a GPU|on a laptop|without a "
            "graphics card|on my laptop|on the CPU)?",
        ),
        "The built-in model runs on any computer. Bigger models want an NVIDIA graphics card and "
        "enough RAM for their experts.",
    ),
    "big card": (
        (
            "(How can|How does|Why can) (a|such a|this) big model (fit|run|work) on (a small card|"
            "one card|my graphics card|one GPU|a small GPU|8 GB)?",
            "(How do you|How does PreScope|How does the app) (run|fit) (a|such|) big (model|"
            "models) on (one|a small|my) (card|GPU|graphics card)?",
        ),
        "Only a few experts work on each token. PreScope keeps those in VRAM and the rest in RAM, "
        "and copies what the predictor expects next.",
    ),
    "read panel": (
        (
            f"{_HOW} (read|understand|use) (the|this) panel?",
            "What (do|can) I (see|read|learn) (in|from|on) (the|this) panel?",
            "What do (the|these|all these) (numbers|figures|colors|bars|lines|squares) (mean|show|"
            "in the panel mean)?",
        ),
        "Look at the hit rate first: high is good. Then look at the stall per token: it shows how "
        "long each token waited for experts. Ask me about any word in the panel.",
    ),
    "which stay": (
        (
            "How does (PreScope|the app|it) (decide|choose|know|pick) (which|what) experts (stay|"
            "are kept|remain|go|belong) (on|in) (the GPU|VRAM|the card|the graphics card)?",
            "(Which|What) experts (stay|are kept|remain|are) (on|in) (the GPU|VRAM|the card|the "
            "cache)?",
            "How (are|does it choose) the experts (chosen|to keep|to evict|in VRAM chosen|for the "
            "cache)?",
        ),
        "PreScope keeps the experts that were used often and lately, and those the predictor "
        "expects next. The others wait in RAM.",
    ),
    "search": (
        (
            f"{_HOW} (search|look for|find something in|search through) (my|the|old|all) (chats|"
            "messages|conversations)?",
            "(Is there|Where is) (a|the) search (box|field|function|)?",
        ),
        "Type a word into the search box above the list of chats.",
    ),
    "own model": (
        (
            f"{_HOW} (add|use|load|bring|open) (my own|a downloaded|my|a local) (model|models)?",
            f"{_HOW} (add|set|change) (a|the|another) model folder?",
            "(Where|How) does the app (find|look for|search for) (models|the models|my models)?",
        ),
        "Open the settings and add the folder of the model under Model folders. It then shows up "
        "in the dropdown at the top.",
    ),
    "copy answer": (
        (f"{_HOW} (copy|save|share) (an answer|the answer|the text|a reply|your answer)?",),
        "Press the Copy button under the answer. The text is then in your clipboard.",
    ),
    "settings": (
        (
            f"{_HOW} (change|open|find|see) (the|my) (settings|options|preferences)?",
            "Where (are|is) the (settings|options|preferences|settings page)?",
            f"{_HOW} (change|set|lower|raise) the (temperature|seed|answer length|maximum length|"
            "system prompt)?",
        ),
        "Open the settings. There you find the theme, the system prompt, the temperature, the "
        "placement policy, the VRAM limit and the model folders.",
    ),
    "cost": (
        (
            "(Is this|Is the app|Is it|Is PreScope|Are you) (free|for free|expensive|free of "
            "charge)?",
            "(How much|What) (does it|does this|does the app|do you) cost?",
            "Do I (have to|need to) pay (for this|for you|anything|)?",
        ),
        "PreScope is free. It runs on your own computer, so there is nothing to pay per message.",
    ),
    "crash": (
        (
            "(The app|It|The model|The engine) (crashed|stopped working|hangs|froze|is stuck|does "
            "not answer|died). (What now?|Help!|What can I do?|What do I do?)",
            "What (do I do|can I do|happens|should I do) if (the app|the model|the engine|it) "
            "(crashes|hangs|freezes|stops|dies)?",
        ),
        "The app restarts its engine by itself and your messages are kept. If it stays stuck, "
        "close the app and start it again.",
    ),
    "api": (
        (
            "(Is there|Do you have|Does the app have|Does PreScope have) (an|a) (API|server|HTTP "
            "interface)?",
            f"{_HOW} (use the API|call the API|connect another program|use it from Python|connect "
            "my own program)?",
        ),
        "Yes, the app has a local API in the usual chat format under /v1, for other programs on "
        "this computer.",
    ),
}
"""Fact name -> (how people ask, the one answer)."""


def how_to(rng: random.Random) -> Item:
    """A question about using the app."""
    return draw_fact(rng, "how_to", HOW_TO)


TASKS = {"how_to": (how_to, 9.0)}
