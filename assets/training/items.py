"""The unit of the corpus: one question with its one right answer, and the held-out rule.

Every item carries a key made of its task and its arguments (numbers, values) or of its
fact and its phrasing. A hash of the key alone decides whether the item may ever be trained
on, so the split is the same in every run, whatever the seed or the order of drawing.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

HELD_OUT_ONE_IN = 12
"""One key in this many belongs to the evaluation and never enters training."""

_GROUP = re.compile(r"\(([^()]*)\)")
_FIELD = re.compile(r"(\{[a-z_0-9]+\})")
_SHORTHAND = {
    "what is": "whats",
    "What is": "Whats",
    " you ": " u ",
    " are ": " r ",
    "please": "pls",
    "I am": "im",
    "don't": "dont",
    "can't": "cant",
    " and ": " & ",
}

_OPENERS = tuple(
    "hey |ok |so |please |um, |well, |Hi! |Hello, |Sorry, |Quick question: |I was wondering, |"
    "Just curious, |I am new here. |One thing: |ok so |hey bot, |Dumb question but |"
    "My friend asks: |Hm, |Right, |Good. |Thanks. |Alright, |Could you help me? |And |"
    "Hi there. |Tell me, |Sorry to ask but |Next one: |Oh, ".split("|")
)
_CLOSERS = tuple(
    " please| thanks| pls|, please| thx| if you don't mind| for me| by the way| anyway| :)| lol|"
    " then| now| you know| real quick| bot| mate".split("|")
)
_DROPPABLE = frozenset("the a an is are do does to of in can could would it".split())


@dataclass(frozen=True)
class Item:
    """One exchange; `before` holds earlier turns it depends on (role, text)."""

    task: str
    key: tuple
    question: str
    answer: str
    before: tuple[tuple[str, str], ...] = ()
    must_mention: tuple[str, ...] = ()


Task = Callable[[random.Random], Item]


def is_held_out(key: tuple) -> bool:
    """Tell whether a key belongs to the evaluation: a pure function of the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def pick(rng: random.Random, options: list | tuple | str):
    """Choose one element."""
    return options[rng.randrange(len(options))]


def expand(rng: random.Random, pattern: str) -> str:
    """Turn `(how do I|how to) stop (it|)` into one of its sentences; groups may nest."""
    while _GROUP.search(pattern):
        pattern = _GROUP.sub(lambda m: pick(rng, m.group(1).split("|")), pattern)
    return re.sub(r" +([?.!,]|$)", r"\1", re.sub(r"  +", " ", pattern)).strip()


def roughen(rng: random.Random, text: str) -> str:
    """Write a sentence the way people type: case, punctuation, shorthand, slips of the finger.

    Fields such as {name} are left alone, so the values an answer depends on stay intact.
    """
    roll = rng.random
    if roll() < 0.14:
        text = pick(rng, _OPENERS) + text
    if roll() < 0.09:
        bare = text.rstrip("?.!")
        text = bare + pick(rng, _CLOSERS) + text[len(bare) :]
    if roll() < 0.08:
        for long_form, short in _SHORTHAND.items():
            if roll() < 0.6:
                text = text.replace(long_form, short)
    parts = _FIELD.split(text)
    if roll() < 0.09:
        parts = _mistype(rng, parts)
    style = roll()
    if style < 0.28:
        parts = [part if _FIELD.fullmatch(part) else part.lower() for part in parts]
    elif style < 0.30:
        parts = [part if _FIELD.fullmatch(part) else part.upper() for part in parts]
    text = "".join(parts)
    ending = roll()
    if ending < 0.17:
        text = text.rstrip("?.!")
    elif ending < 0.22 and text.endswith(("?", "!")):
        text += text[-1] * rng.randint(1, 2)
    return text


def _mistype(rng: random.Random, parts: list[str]) -> list[str]:
    """Swap, drop or double one letter of one longer word outside the fields."""
    spots = [
        (i, m.start(), m.end())
        for i, part in enumerate(parts)
        if not _FIELD.fullmatch(part)
        for m in re.finditer(r"[A-Za-z]{4,}", part)
    ]
    if not spots:
        return parts
    i, start, end = pick(rng, spots)
    at = rng.randrange(start, end - 1)
    word = parts[i]
    change = rng.randrange(3)
    if change == 0:
        word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    elif change == 1:
        word = word[:at] + word[at + 1 :]
    else:
        word = word[: at + 1] + word[at:]
    return [*parts[:i], word, *parts[i + 1 :]]


def blur(rng: random.Random, text: str) -> str:
    """Sometimes leave out a small word, as hurried people and learners do."""
    words = text.split(" ")
    spots = [i for i, word in enumerate(words) if word.lower() in _DROPPABLE]
    if len(words) < 4 or not spots or rng.random() > 0.08:
        return text
    del words[pick(rng, spots)]
    return " ".join(words)


def ask(rng: random.Random, patterns: tuple[str, ...], **values: object) -> str:
    """One rough sentence from a set of patterns, with the values filled in."""
    text = roughen(rng, expand(rng, pick(rng, patterns)))
    return text.format(**values)


def phrase_fact(
    rng: random.Random, task: str, fact: str, patterns: tuple[str, ...], answer: str
) -> Item:
    """An item whose held-out thing is the phrasing: the key is the fact and the clean sentence."""
    clean = expand(rng, pick(rng, patterns))
    return Item(task, (task, fact, clean), roughen(rng, blur(rng, clean)), answer)


def draw_fact(rng: random.Random, task: str, facts: dict[str, tuple[tuple[str, ...], str]]) -> Item:
    """One of many facts, each with the ways people ask for it and its one answer."""
    name = pick(rng, tuple(facts))
    patterns, answer = facts[name]
    return phrase_fact(rng, task, name, patterns, answer)
