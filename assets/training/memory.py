"""Facts a person tells, to be remembered across turns: statement, reply, question, answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from assets.training.items import ask, is_held_out, pick
from assets.training.words import COLORS, FOODS, HOBBIES, JOBS, NOUNS, PETS, person, town


@dataclass(frozen=True)
class Slot:
    """One kind of fact; {v} is the value, {w} a second value where there is one."""

    draw: Callable[[random.Random], tuple[str, ...]]
    tell: tuple[str, ...]
    reply: str
    question: tuple[str, ...]
    answer: str
    unknown: str


@dataclass(frozen=True)
class Memory:
    """A drawn fact: what is told, the reply, what is asked later, the answer."""

    slot: str
    key: tuple
    told: str
    reply: str
    question: str
    answer: str


def _one(options: tuple[str, ...]) -> Callable[[random.Random], tuple[str, ...]]:
    return lambda rng: (pick(rng, options),)


def _number(low: int, high: int) -> Callable[[random.Random], tuple[str, ...]]:
    return lambda rng: (str(rng.randint(low, high)),)


_RECALL = "(|||Do you remember: |Quick question: |So, |Tell me, |Now, )"
_KIN = ("sister", "brother", "mother", "father", "friend", "teacher", "son", "daughter", "boss")

SLOTS: dict[str, Slot] = {
    "name": Slot(
        lambda rng: (person(rng),),
        (
            "(Hi|Hello|Hey|||)(!|,|.) (my name is|I am called|my name's|people call me|you can "
            "call me|call me|I'm|I am|it's) {v}.",
            "My name is {v}(, what is yours|. Please remember it|)(?|.)",
        ),
        "Nice to meet you, {v}!",
        (
            f"{_RECALL}(what is|what's) my name?",
            "(Do you|Can you) (remember|know|still know|recall) my name?",
            "Who am I?",
            "(What|How) (am I called|did I say my name was)?",
            "(Say|Tell me) my name.",
        ),
        "Your name is {v}.",
        "You have not told me your name yet.",
    ),
    "color": Slot(
        _one(COLORS),
        (
            "My (favorite|favourite|best|preferred) color is {v}.",
            "(I like|I love) (the color|) {v} (best|most|the most).",
        ),
        "I will remember that you like {v}.",
        (
            f"{_RECALL}(what is|what's) my (favorite|favourite) color?",
            "(Which|What) color do I like (best|most)?",
            "(Do you remember|Do you know) my (favorite|favourite) color?",
        ),
        "Your favorite color is {v}.",
        "You have not told me your favorite color yet.",
    ),
    "pet": Slot(
        lambda rng: (pick(rng, PETS), person(rng)),
        (
            "(I have|I've got|We have|I own) a {v} (named|called|with the name) {w}.",
            "My {v} is (called|named) {w}.",
            "My (pet is a {v}|{v} has a name). (Its|The) name is {w}.",
        ),
        "What a nice name for a {v}: {w}!",
        (
            f"{_RECALL}(what is|what's) (the name of my pet|my pet's name|my pet called|my pet)?",
            "(Which|What) pet do I have?",
            "(Do you remember|Do you know) (my pet|my pet's name|the name of my pet)?",
            "(What is|How is|What's) (my {v} called|the name of my {v}|my {v}'s name)?",
        ),
        "You have a {v} named {w}.",
        "You have not told me about a pet yet.",
    ),
    "town": Slot(
        lambda rng: (town(rng),),
        ("(I live in|I am from|I'm from|My home is in|I come from|My home town is) {v}.",),
        "I hope life is good in {v}.",
        (
            f"{_RECALL}where do I live?",
            "(Which|What) (city|town|place) (do I live in|am I from|do I come from)?",
            "Where am I from?",
            "(Do you remember|Do you know) where I (live|come from)?",
        ),
        "You live in {v}.",
        "You have not told me where you live yet.",
    ),
    "number": Slot(
        _number(1, 9999),
        (
            "My (lucky|favorite|secret) number is {v}.",
            "(Please remember|Remember|Keep in mind) (the number|the code|number) {v}.",
            "(The door code|My code|The code|My secret code) is {v}.",
        ),
        "I will remember {v}.",
        (
            f"{_RECALL}what (is|was) (my number|the number|my lucky number|the code|my code|my "
            "secret number)?",
            "(Which|What) (number|code) did I (tell you|say|give you)?",
            "(Do you remember|Do you know) (my number|the number|the code)?",
        ),
        "Your number is {v}.",
        "You have not told me a number yet.",
    ),
    "word": Slot(
        _one(NOUNS),
        (
            "(The|My|Our) (secret word|magic word|password|code word) is {v}.",
            "(Please remember|Remember|Keep in mind) the word {v}.",
        ),
        "I will remember the word {v}.",
        (
            f"{_RECALL}what (is|was) (the|my) (secret word|magic word|password|code word|word)?",
            "(Which|What) word (did I tell you|should you remember|did I say)?",
            "(Tell me|Say) the (secret word|password|magic word).",
        ),
        "The word is {v}.",
        "You have not told me a word yet.",
    ),
    "food": Slot(
        _one(FOODS),
        (
            "My (favorite|favourite) (food|dish|meal) is {v}.",
            "(I love|I like|I really like) (to eat|eating) {v}.",
        ),
        "I will remember that you like {v}.",
        (
            f"{_RECALL}(what is|what's) my (favorite|favourite) (food|dish|meal)?",
            "What (do I like to eat|food do I like|do I love to eat)?",
        ),
        "Your favorite food is {v}.",
        "You have not told me your favorite food yet.",
    ),
    "hobby": Slot(
        _one(HOBBIES),
        (
            "My hobby is {v}.",
            "(In my free time|On weekends|After work) I (do|like|enjoy) {v}.",
            "My (favorite|favourite) (hobby|sport) is {v}.",
        ),
        "It sounds like fun: {v}.",
        (
            f"{_RECALL}(what is|what's) my (hobby|favorite hobby|sport)?",
            "What do I (do|like|enjoy) in my free time?",
            "(Do you remember|Do you know) my hobby?",
        ),
        "Your hobby is {v}.",
        "You have not told me your hobby yet.",
    ),
    "job": Slot(
        _one(JOBS),
        ("(I am a|I'm a|I work as a) {v}.", "My job is {v}."),
        "Being a {v} must be interesting.",
        (
            f"{_RECALL}(what is|what's) my (job|profession|work)?",
            "What do I (do for a living|work as)?",
            "(Do you remember|Do you know) my job?",
        ),
        "You work as a {v}.",
        "You have not told me your job yet.",
    ),
    "age": Slot(
        _number(5, 99),
        ("(I am|I'm) {v} years old.", "My age is {v}.", "I (just turned|turned|am now) {v}."),
        "{v} is a good age.",
        (
            f"{_RECALL}how old am I?",
            "(What is|What's) my age?",
            "(Do you remember|Do you know) (my age|how old I am)?",
        ),
        "You are {v} years old.",
        "You have not told me your age yet.",
    ),
    "kin": Slot(
        lambda rng: (pick(rng, _KIN), person(rng)),
        (
            "My {v} is (called|named) {w}.",
            "My {v}'s name is {w}.",
            "(The name of my {v} is|I have a {v} named|I have a {v} called) {w}.",
        ),
        "I will remember your {v} {w}.",
        (
            f"{_RECALL}(what is|what's) (my {{v}}'s name|the name of my {{v}}|my {{v}} called)?",
            "(Do you remember|Do you know) (my {v}'s name|the name of my {v})?",
            "Who is my {v}?",
        ),
        "Your {v} is called {w}.",
        "You have not told me that name yet.",
    ),
}


def draw_memory(rng: random.Random, held_out: bool, exclude: tuple[str, ...] = ()) -> Memory:
    """A fact on the wanted side of the split; values of one word are held out by value."""
    names = tuple(name for name in SLOTS if name not in exclude)
    if not held_out and "name" in names and "town" in names and rng.random() < 0.08:
        return _name_and_town(rng)
    while True:
        # Names are what people try first, so they come up more often.
        name = "name" if "name" in names and rng.random() < 0.3 else pick(rng, names)
        slot = SLOTS[name]
        values = slot.draw(rng)
        if rng.random() < 0.1 and name in ("name", "town"):
            values = tuple(value.lower() for value in values)
        key = ("memory", name, *values)
        if is_held_out(key) == held_out:
            break
    fields = dict(zip("vw", values, strict=False))
    return Memory(
        name,
        key,
        ask(rng, slot.tell, **fields),
        slot.reply.format(**fields),
        ask(rng, slot.question, **fields),
        slot.answer.format(**fields),
    )


def _name_and_town(rng: random.Random) -> Memory:
    """Two facts in one sentence, one of them asked for later."""
    while True:
        who, where = person(rng), town(rng)
        keys = ("memory", "name", who), ("memory", "town", where)
        if not any(map(is_held_out, keys)):
            break
    told = ask(
        rng,
        (
            "(Hi, |Hello, |) (I am|I'm|my name is) {v} (and I live in|and I am from|from) {w}.",
            "(My name is|I am called) {v}. (I live in|I come from|I am from) {w}.",
        ),
        v=who,
        w=where,
    )
    name, key, value = pick(rng, (("name", keys[0], who), ("town", keys[1], where)))
    question = ask(rng, SLOTS[name].question)
    reply = f"Nice to meet you, {who}! I hope life is good in {where}."
    return Memory(name, key, told, reply, question, SLOTS[name].answer.format(v=value))


def draw_unknown(rng: random.Random, exclude: tuple[str, ...] = ()) -> tuple[str, str]:
    """A question about a fact that was never told, and the honest reply."""
    name = pick(rng, tuple(n for n in SLOTS if n not in exclude))
    slot = SLOTS[name]
    return ask(rng, slot.question, v=pick(rng, _KIN)), slot.unknown
