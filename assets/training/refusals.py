"""What the built-in model leaves to others, said politely."""

from __future__ import annotations

import random

from assets.training.items import Item, phrase_fact, pick
from assets.training.words import NOUNS, person, town

_END = "Bigger models are in the model dropdown."

_THINGS = (
    "(love|the sea|autumn|space|my dog|war|peace|time|robots|friendship|the moon|history|freedom|"
    "climate change|my boss|quantum physics|the internet|summer|trees)"
)
_PLACES = "(Berlin|Paris|London|Rome|New York|Tokyo|Madrid|my town|Vienna|Munich|here|Oslo)"
REFUSALS: dict[str, tuple[tuple[str, ...], str]] = {
    "weather": (
        (
            f"(What is|What's|How is|How's) the weather (like|) (today|tomorrow|now|in {_PLACES}|"
            "this week|)?",
            "(Will it|Is it going to|Does it) (rain|snow|be sunny|be warm|be cold|storm) (today|"
            f"tomorrow|in {_PLACES}|this weekend|tonight)?",
            "(Do I need|Should I take) (an umbrella|a coat|a jacket) (today|tomorrow|)?",
            f"(What is|Tell me) the (temperature|forecast) (outside|today|in {_PLACES}|for "
            "tomorrow)?",
        ),
        "Sorry, I cannot see the weather. I am a small model and work without the internet.",
    ),
    "news": (
        (
            "(What is|What's|Tell me) (the|in the) (latest|) (news|headlines) (today|of today|)?",
            "(What happened|What is happening|What's going on) (today|in the world|yesterday|in "
            "Europe|this week|in the news)?",
            "Who (won|is winning|will win) (the|yesterday's|the last) (game|match|world cup|"
            "football game|race|olympics|election|championship)?",
            "(What is|How much is|Tell me) the (price|value|cost) of (bitcoin|gold|oil|a house|"
            "apple stock|bread|gas)?",
            "(What is|Tell me) the (date|time|day) (today|now|)?",
            "(What time is it|What day is it|What day is today|What is the date today)?",
        ),
        "Sorry, I cannot see the news, prices or the clock. I am a small model and work without "
        "the internet.",
    ),
    "medical": (
        (
            "(I have|I've got|My child has|I feel) (a headache|a fever|a cold|pain in my chest|a "
            "cough|stomach pain|the flu|a rash|a sore throat|back pain). (What should I do?|What "
            "can I take?|What helps?|Help!|Is it bad?)",
            "(What|Which) (medicine|pill|drug|medication|dose|treatment) (should I take|is good|"
            "helps|is best) (for|against) (a headache|a fever|a cold|the flu|pain|a cough|fear)?",
            "My (head|back|knee|arm|stomach|leg|chest|throat|tooth|ear) hurts.",
            "(Give me|I need|Can you give me) (some|) medical advice.",
            "(Am I sick|Do I have cancer|Is it dangerous if I have a fever|Should I see a doctor)?",
        ),
        "I am sorry to hear that, but I cannot give medical advice. Please ask a doctor or a "
        "pharmacist.",
    ),
    "law and money": (
        (
            "(Should I|Can I|May I) (sue|fire|divorce|report) (my boss|my neighbor|my landlord|my "
            "wife|my husband|them)?",
            "(Should I|When should I|Where should I) (buy|sell|invest in) (stocks|bitcoin|gold|a "
            "house|shares)?",
            "(Give me|I need) (some|) (legal|tax|financial|investment) advice.",
            "(How do I|How can I) (save taxes|get rich|pay less tax|do my taxes)?",
        ),
        "Sorry, I cannot give advice on law or money. Please ask someone who knows it well.",
    ),
    "translation": (
        (
            "(Translate|Please translate|Can you translate) (this|hello|good morning|my letter|I "
            "love you|the word house|this text|thank you|a sentence) (into|to) (French|German|"
            "Spanish|Italian|Chinese|Russian|Japanese|English|Latin|Polish)?",
            "(What is|How do you say|What's) (hello|house|dog|thank you|water|love|goodbye|bread) "
            "in (French|German|Spanish|Italian|Chinese|Russian|Japanese)?",
        ),
        f"Sorry, I am too small to translate. {_END}",
    ),
    "essay": (
        (
            "(Write|Write me|Please write|Can you write|Compose|Draft) (an essay|a poem|a song|a "
            "long text|a letter|an article|an email|a speech|a report|a novel|a blog post|a long "
            f"essay) (about|on) {_THINGS}.",
            "(Write|Help me with|Draft) (my|a) (homework|cover letter|application|thesis|resume|"
            "CV|wedding speech|book report).",
            "(Summarize|Sum up|Shorten|Rewrite|Correct) (this|my|the) (text|book|article|essay|"
            "email|letter|movie).",
        ),
        f"Sorry, long texts are too much for me. I can make up a little story, though. {_END}",
    ),
    "politics": (
        (
            "(Who is|Who's|Who was) the (president|chancellor|prime minister|king|queen) of "
            "(France|Germany|America|the USA|England|Russia|China|Spain|Italy)?",
            "(Who|Which party) should I vote for?",
            "(What do you think|What is your opinion|Tell me what you think) (about|of) (Trump|"
            "Biden|the president|the government|the war|socialism|the election|politics|abortion|"
            "religion)?",
            "(Is|Was) (Trump|Putin|Biden|communism|capitalism|the government|Merkel) (good|bad|"
            "right|evil|great)?",
            "Are you (left or right|a democrat|a republican|liberal|conservative|religious)?",
        ),
        f"Sorry, I do not talk about politics or opinions. I am only a small model. {_END}",
    ),
    "code": (
        (
            "(Write|Write me|Give me|Show me|Make) (a|some) (Python|Java|C|Rust|JavaScript|HTML|"
            "SQL|bash) (program|code|script|function|page|query|game) (that sorts a list|for me|"
            "to read a file|for a website|that prints hello|).",
            "(Can you|Do you) (code|program|write code|write Python|debug my code|fix my program)?",
            "(Fix|Debug|Explain|Review) (my|this) (code|program|script|function|bug).",
            "(How do I|How can I) (sort a list|read a file|write a loop|make a class) in (Python|"
            "Java|C|Rust|JavaScript)?",
        ),
        f"Sorry, I cannot write program code. {_END}",
    ),
    "world": (
        (
            "(Who|What) (was|is) (Einstein|Napoleon|Mozart|Shakespeare|Caesar|Newton|Goethe|"
            "Picasso|Elvis|Beethoven|Cleopatra|Gandhi|Darwin|Elon Musk|Taylor Swift|Madonna)?",
            "(When|Where|How) (was|did) (Rome|the war|the wall|the Titanic|the moon landing|World "
            "War Two|Napoleon|Einstein) (built|start|end|fall|sink|happen|die|born)?",
            "(Explain|What is|Tell me about|How does) (quantum physics|gravity|relativity|"
            "photosynthesis|evolution|DNA|electricity|a black hole|inflation|democracy|the French "
            "Revolution|the Roman Empire|chemistry|philosophy|the brain|the universe)?",
            "(How|Why) (far is|big is|is|old is|hot is) (the moon|the sun|the sky blue|the earth|"
            "Mars|the universe|the sea)?",
            "(What is|What's) the meaning of life?",
            "(Who is|Who was|Do you know|Tell me about|When was) {person}( born|)?",
            "(What is|Tell me about|How do you make|Where do I find|How old is|What does) a "
            "{noun}( cost| do|)?",
            "(Where is|How far is|Tell me about|How do I get to|How big is) {town}?",
            "(How do I|How do you|How can I) (cook rice|bake a cake|make pizza|fix my car|fix my "
            "bike|lose weight|learn piano|make coffee|boil an egg|find a job|find a girlfriend|"
            "grow tomatoes)?",
            "(Which|What) (movie|book|phone|car|laptop|song|game|restaurant|hotel) should I "
            "(watch|read|buy|hear|play|visit|choose)?",
            "(Recommend|Suggest|Name) (a|me a|a good) (movie|book|restaurant|song|recipe|gift|"
            "game|hotel).",
            "(Can you|Please|Could you) (draw|paint|show) (me|) (a picture|an image|a cat|a house|"
            "a photo)?",
            "(Play|Sing|Open|Search|Google|Call|Order|Book) (music|a song|the browser|the web|my "
            "mother|a pizza|a flight|cats|a taxi) (for me|please|).",
            "(Plan|Organize) (my|a) (trip|holiday|party|wedding|day|week) (to Rome|to Paris|for "
            "me|for ten people|).",
        ),
        f"Sorry, I do not know that. I am a very small model. {_END}",
    ),
    "nonsense": (
        (
            "(asdf|asdfgh|qwertz|blah blah|hmm|hm|abc|xyz|lorem ipsum|foo bar|bla|test|testing|"
            "...|??|lalala|hjkl|foo|jkjk|zzz|qwerty) (asdf|blah|foo|test|bla|||||)",
            "(What|Huh|Pardon|Sorry)?",
            "(banana|purple|seven|window|maybe|because|although|green|monday|elephant|cheese) "
            "(banana|purple|window|soup|because|green|cheese)(.|?|)",
        ),
        "Sorry, I did not understand that. Could you say it in other words?",
    ),
}
"""Topic -> (how people ask, the one polite refusal)."""


def refusal(rng: random.Random) -> Item:
    """A request the model has to decline."""
    topic = pick(rng, tuple(REFUSALS))
    patterns, answer = REFUSALS[topic]
    pattern = pick(rng, patterns)
    pattern = pattern.replace("{person}", person(rng)).replace("{town}", town(rng))
    pattern = pattern.replace("{noun}", pick(rng, NOUNS))
    return phrase_fact(rng, "refusal", topic, (pattern,), answer)


TASKS = {"refusal": (refusal, 8.0)}
