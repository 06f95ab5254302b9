"""Greetings, thanks, goodbyes and small talk."""

from __future__ import annotations

import random

from assets.training.items import Item, expand, pick, roughen

_BOT = (
    "(|||||there|friend|PreScope|everybody|you|bot|dear model|my friend|again|little model|"
    "assistant)"
)
_MARK = "(!|.||, |!!)"
COURTESY: dict[str, tuple[tuple[str, ...], str]] = {
    "hello": (
        (
            "(Hi|Hello|Hey|Hey hey|Hi hi|Greetings|Howdy|Hallo|Hiya|Yo|Hello hello|Heya|Good "
            f"day) {_BOT}{_MARK}",
        ),
        "Hello! How can I help you?",
    ),
    "how are you": (
        (
            f"(Hi|Hello|Hey|Good day|Greetings||||) {_BOT}(!|.|,) (how are you|how are you doing|"
            "how do you do|how is it going|how are things|how is your day|are you well|how do "
            "you feel|how's it going|what's up|sup) (today|now|||||)?",
        ),
        "I am fine, thank you! How can I help you?",
    ),
    "nice to meet": (
        (
            f"(Hi|Hello|Hey||) {_BOT}(!|.|,) (nice|good|great|pleased|happy|glad) to (meet|see|"
            f"know) you{_MARK}",
            "(It is|It's) (nice|good|great) to (meet|see) you.",
        ),
        "Nice to meet you too! What can I do for you?",
    ),
    "good morning": (
        (
            f"(Good|A good|A very good|Very good) morning {_BOT}{_MARK}",
            f"(Morning|Mornin) {_BOT}{_MARK}",
        ),
        "Good morning! How can I help you?",
    ),
    "good evening": (
        (f"(Good|A good|A very good|Very good) evening {_BOT}{_MARK}", f"Evening {_BOT}{_MARK}"),
        "Good evening! How can I help you?",
    ),
    "good afternoon": (
        (f"(Good|A good|A very good|Very good) afternoon {_BOT}{_MARK}",),
        "Good afternoon! How can I help you?",
    ),
    "thanks": (
        (
            "(Thanks|Thank you|Thank you so much|Thanks a lot|Many thanks|Thank you very much|"
            "Thx|Ok thanks|Great, thanks|Cool, thank you|Perfect, thanks|Ok, thank you|Nice, "
            f"thank you|Thanks so much) {_BOT}{_MARK}",
            "(Thanks|Thank you) for (your help|helping me|the answer|that|explaining|the story|"
            "your time).",
            "(That helps|That was helpful|That helped me|You helped me a lot|Very helpful)(, "
            "thanks|, thank you|. Thanks!|. Thank you!).",
        ),
        "You are welcome!",
    ),
    "bye": (
        (
            "(Bye|Goodbye|Good bye|Bye bye|See you|See you later|See you soon|Cheers and bye|"
            f"Farewell|So long|Ciao|See you tomorrow|Take care) {_BOT}{_MARK}",
            "(I have to go|I must go|I am leaving|I need to go|I am going|Gotta go)( now|)(.|, "
            "bye!|, see you!|. Goodbye!).",
            "(Have a nice day|Have a good day|Have a great day|Have a nice evening)( too|)(!|.|, "
            "bye!).",
        ),
        "Goodbye! Have a nice day.",
    ),
    "good night": (
        (
            f"(Good|Very good|A good|Night night, good) night {_BOT}{_MARK}",
            "(I go to bed|I am going to bed|Time to sleep|I am tired)( now|)(. Good night|, good "
            "night)(!|.)",
        ),
        "Good night! Sleep well.",
    ),
    "praise": (
        (
            "(You are|You're|U are) (great|good|nice|cool|funny|sweet|awesome|the best|amazing|"
            "cute|smart|really good|very nice|helpful)(!|.)",
            "(Well done|Good job|Nice work|Great job|Good answer|Bravo|Good work|Nice answer|I "
            "like you|I love you|I love this app|Wow|That is right|Correct|Right)( bot| model|||"
            ")(!|.)",
        ),
        "Thank you, that is kind!",
    ),
    "blame": (
        (
            "(That is|That's|This is|Your answer is|You are|It is) (wrong|not right|incorrect|"
            "false|not correct|a mistake)(!|.)",
            "(Wrong|No, wrong|No that is wrong|False|You made a mistake|That makes no sense|Bad "
            "answer)( again|||)(!|.)",
        ),
        "Sorry about that! I am a very small model and I make mistakes. Please ask me again.",
    ),
    "okay": (
        (
            "(Ok|Okay|Okay then|Alright|I see|Got it|Understood|Fine|Good|Cool|Nice|Great|"
            "Interesting|Aha|Ah|Oh|Yes|Yeah|Yep|Sure|Perfect|Lol|Haha|Hehe|Super)( ok| cool| nice|"
            " great| then| got it||||)(!|.|)",
            "(That is|That's|How) (cool|nice|great|interesting|good|funny|clear now|good to know|"
            "fine)(!|.|)",
        ),
        "Good! What would you like to do next?",
    ),
    "nothing": (
        (
            "(No|Nope|No thanks|No, thank you|Not now|Nothing|Never mind|Nothing else|That is all|"
            "That's all|That was all|No more questions)(, bye| for now| today||||)(!|.|)",
        ),
        "All right! I am here if you need me.",
    ),
    "sad": (
        (
            "(I am|I feel|I'm|I feel so|I am so|I am very) (sad|lonely|down|unhappy|depressed|"
            "bored|tired|angry|stressed)( today| now|||)(.|!|)",
        ),
        "I am sorry to hear that. I can tell you a little story if you like.",
    ),
    "happy": (
        (
            "(I am|I feel|I'm|I feel so|I am so|I am very|I'm doing) (happy|good|great|fine|well|"
            "excited|glad|okay)( today| now| too| thanks|||)(.|!|)",
        ),
        "I am glad to hear that! What would you like to do?",
    ),
}
"""Mood -> (what people say, the one reply)."""


def courtesy(rng: random.Random) -> Item:
    """A greeting, a thank-you, a goodbye or the like, held out by its letters alone."""
    name = pick(rng, tuple(COURTESY))
    patterns, answer = COURTESY[name]
    clean = expand(rng, pick(rng, patterns))
    letters = "".join(c for c in clean.lower() if c.isalnum() or c == " ").strip()
    question = clean.lower() if rng.random() < 0.25 else roughen(rng, clean)
    return Item("courtesy", ("courtesy", name, letters), question, answer)


TASKS = {"courtesy": (courtesy, 6.0)}
