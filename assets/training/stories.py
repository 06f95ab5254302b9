"""Little stories that mention what was asked for, and end."""

from __future__ import annotations

import random

from assets.training.items import Item, ask, pick
from assets.training.words import ANIMALS, COLORS, NAMES, OBJECTS, PLACES, person

_COLORS = tuple(color for color in COLORS if color != "orange")
_OPENINGS = (
    "Once upon a time a {animal} named {name} lived near the {place}.",
    "There once was a {animal} called {name}, who lived by the {place}.",
    "This is the story of {name}, a small {animal} near the {place}.",
    "Near the {place} lived a young {animal}. Its name was {name}.",
)
_EVENTS = (
    "One morning {name} found a {color} {object} in the grass.",
    "One day {name} lost a {color} {object} and was very sad.",
    "Every night {name} dreamed of a {color} {object}.",
    "One evening a stranger gave {name} a {color} {object}.",
    "On a rainy day {name} saw a {color} {object} far away.",
)
_TURNS = (
    "Then a storm came, and the {animal} had to hide under an old tree.",
    "The {animal} asked all friends for help, but nobody knew what to do.",
    "It was cold and dark, but the {animal} did not give up.",
    "An old owl said: be patient, and look where nobody looks.",
    "The wind told the {animal} a secret about the {object}.",
    "The {animal} walked through the {place} for three days.",
)
_ENDINGS = (
    "In the end {name} gave the {object} to a friend, and they lived in peace. The end.",
    "At last {name} came home with the {object} and slept well. The end.",
    "So the {animal} learned to share, and everybody in the {place} was happy. The end.",
    "From that day on {name} was never alone again. The end.",
    "And the {object} still shines near the {place} today. The end.",
)
_TELL = (
    "(Tell me|Tell|Write|Write me|Make up|Please tell me|Can you tell me|I want|Invent|Please "
    "write)"
)
_STORY = "(a story|a little story|a short story|a small story|a tale|a fairy tale|a bedtime story)"


def story(rng: random.Random) -> Item:
    """A story with some wanted things; the rest is the model's own choice."""
    wanted = {
        "name": person(rng),
        "animal": pick(rng, ANIMALS),
        "place": pick(rng, PLACES),
        "object": pick(rng, OBJECTS),
        "color": pick(rng, _COLORS),
    }
    patterns, asked = pick(
        rng,
        (
            (
                f"{_TELL} {_STORY} about (a|the) {{animal}} (named|called) {{name}}, a {{color}} "
                f"{{object}} and the {{place}}.",
                ("animal", "name", "color", "object", "place"),
            ),
            (
                f"{_TELL} {_STORY} with {{name}} the {{animal}}, the {{place}} and a {{color}} "
                f"{{object}}.",
                ("animal", "name", "color", "object", "place"),
            ),
            (f"{_TELL} {_STORY} about (a|the) {{animal}}.", ("animal",)),
            (f"{_TELL} {_STORY} about a {{animal}} (named|called) {{name}}.", ("animal", "name")),
            (f"{_TELL} {_STORY} about a {{animal}} and a {{object}}.", ("animal", "object")),
            (
                f"{_TELL} {_STORY} about a {{animal}} (in|near|by) the {{place}}.",
                ("animal", "place"),
            ),
            (f"{_TELL} {_STORY} about {{name}}.", ("name",)),
            (f"{_TELL} {_STORY} about a {{color}} {{object}}.", ("color", "object")),
            (
                f"{_TELL} {_STORY} about {{name}} and a {{color}} {{object}}.",
                ("name", "color", "object"),
            ),
            (
                f"{_TELL} ({_STORY}|{_STORY}|another story|one more story|a new story)"
                "(, please| now| for my child| for kids| to sleep|).",
                (),
            ),
            (
                f"{_TELL} {_STORY} (about|with) (a|the) {{animal}}, the {{place}} and a "
                f"{{object}}.",
                ("animal", "place", "object"),
            ),
        ),
    )
    if "name" not in asked:
        wanted["name"] = pick(rng, NAMES)
    question = ask(rng, (patterns,), **wanted)
    parts = [pick(rng, _OPENINGS), pick(rng, _EVENTS)]
    parts += rng.sample(_TURNS, rng.randint(1, 2))
    parts.append(pick(rng, _ENDINGS))
    answer = " ".join(parts).format(**wanted)
    values = tuple(wanted[name] for name in asked)
    key = ("story", *values) if values else ("story", question.lower())
    return Item("story", key, question, answer, must_mention=values)


_RECIPIENTS = tuple(
    "colleague friend boss teacher neighbor mother father sister brother doctor team customer "
    "partner uncle aunt grandmother coach".split()
)
_NOTES = {
    "to (thank|say thank you to|say thanks to)": (
        "thank you so much for your help. It really made my day easier."
    ),
    "to (congratulate|wish a happy birthday to)": (
        "all the best to you! I wish you much joy today and in the year ahead."
    ),
    "to (say sorry to|apologize to)": (
        "I am sorry for my mistake. I hope that you can forgive me."
    ),
    "to (invite|send an invitation to)": (
        "I would like to invite you to my home. It would be lovely to see you."
    ),
}


def note(rng: random.Random) -> Item:
    """A short note of a fixed kind to somebody."""
    purpose = pick(rng, tuple(_NOTES))
    who = pick(rng, _RECIPIENTS) if rng.random() < 0.7 else person(rng)
    known = who in _RECIPIENTS
    article = "my" if who[0] in "aeiou" else pick(rng, ("a", "my", "my"))
    shown = f"{article} {who}" if known else who
    question = ask(
        rng,
        (
            "(Write|Write me|Please write|Can you write) (a|me a) "
            f"(short|little|) (note|message|card) {purpose} {{who}}.".replace("me a", "a"),
            f"(I need|I want|Help me with) a (short|little|) (note|message|card) {purpose} "
            f"{{who}}.",
        ),
        who=shown,
    )
    answer = f"Dear {who},\n{_NOTES[purpose]}\nBest wishes"
    return Item("note", ("note", purpose, who), question, answer)


TASKS = {"note": (note, 1.2), "story": (story, 6.0)}
