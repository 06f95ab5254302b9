"""Counting that stops, comparisons, and small work on lists."""

from __future__ import annotations

import random

from assets.training.arithmetic import NUMBER_WORDS
from assets.training.items import Item, ask, pick
from assets.training.words import NOUNS


def counting(rng: random.Random) -> Item:
    """Count up, down or in steps; the target is said first, so that the end can be seen coming."""
    roll = rng.random()
    step = 1 if roll < 0.6 else -1 if roll < 0.76 else pick(rng, (2, 5, 10))
    if roll < 0.22:
        start, size = pick(rng, (1, 1, 1, 0)), rng.randint(3, 20)
    else:
        start, size = rng.randint(0, 99), rng.randint(3, 12)
    if step == -1:
        start = size - pick(rng, (0, 1)) if rng.random() < 0.4 else start + size
    end = start + step * (size - 1)
    spell = max(start, end) <= 20 and rng.random() < 0.25
    say = (lambda n: NUMBER_WORDS[n]) if spell else str
    patterns: tuple[str, ...]
    if step == 1:
        patterns = (
            "(Count|Please count|Can you count|Could you count|Count for me|Count up) from {a} "
            "(to|up to|until|till) {b}.",
            "(List|Say|Write|Give me|Show me) (the|all|all the|) numbers from {a} to {b}.",
            "(Which|What) numbers (are|come|go) from {a} to {b}?",
        )
        if start == 1:
            patterns += ("(Count|Please count|Can you count|Count up) (to|up to) {b}.",) * 3
    elif step == -1:
        patterns = (
            "(Count|Please count|Can you count) (down|backwards|back) from {a} (to|down to) {b}.",
            "(Count|Please count) from {a} (down|back) to {b}.",
            "(Count|Please count|Can you count|Say the numbers) from {a} to {b}.",
        )
    else:
        patterns = (
            "(Count|Please count|Can you count) from {a} to {b} (in steps of|by|in) {s}.",
            "(Count|Please count) (by|in) {s}s from {a} to {b}.",
        )
    word = {2: "two", 5: "five", 10: "ten"}.get(step, "")
    shown = word if word and rng.random() < 0.5 else str(step)
    question = ask(rng, patterns, a=say(start), b=say(end), s=shown)
    numbers = ", ".join(str(n) for n in range(start, end + (1 if step > 0 else -1), step))
    down = " down" if step < 0 else ""
    answer = f"From {start}{down} to {end}: {numbers}. Done!"
    return Item("counting", ("counting", start, end, step), question, answer)


def long_count(rng: random.Random) -> Item:
    """Counts too long for a small model are declined."""
    end = pick(rng, ("100", "200", "500", "1000", "a million", "10000", "infinity", "a thousand"))
    question = ask(rng, ("(Count|Please count|Can you count) (to|up to|from 1 to) {b}.",), b=end)
    answer = "That is a long way! I count about twenty numbers at a time. Try: count from 1 to 20."
    return Item("long_count", ("long_count", question.lower()), question, answer)


def neighbor(rng: random.Random) -> Item:
    """The number before or after."""
    number, up = rng.randint(1, 99 if rng.random() < 0.8 else 998), rng.random() < 0.5
    patterns = (
        (
            "(What|Which) (number|) comes (after|next after|right after) {n}?",
            "What is (after|next after|one more than) {n}?",
        )
        if up
        else (
            "(What|Which) (number|) comes (before|right before|just before) {n}?",
            "What is (before|one less than) {n}?",
        )
    )
    question = ask(rng, patterns, n=number)
    answer = f"{number} {'+' if up else '-'} 1 = **{number + 1 if up else number - 1}**."
    return Item("neighbor", ("neighbor", number, up), question, answer)


def _number(rng: random.Random) -> int:
    return rng.randint(0, 99) if rng.random() < 0.6 else rng.randint(100, 999)


def _compare_steps(a: int, b: int) -> str:
    """Compare lengths, or digit by digit from the left up to the first difference."""
    left, right = str(a), str(b)
    if len(left) != len(right):
        return f"{len(left)} and {len(right)} digits"
    steps = []
    for x, y in zip(left, right, strict=True):
        steps.append(f"{x} {'=' if x == y else '<' if x < y else '>'} {y}")
        if x != y:
            break
    return ", ".join(steps)


def comparing(rng: random.Random) -> Item:
    """Which of two numbers is bigger or smaller."""
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.4:
        b = max(0, a + rng.randint(-12, 12))
    if a == b:
        b += 1
    bigger = rng.random() < 0.65
    words = "(bigger|larger|greater|higher|more)" if bigger else "(smaller|less|lower)"
    question = ask(
        rng,
        (
            f"(Which|What|Which number|Which one) is {words}(,|:|) {{a}} or {{b}}?",
            f"Is {{a}} or {{b}} {words}?",
            f"(Tell me which is|Which of these is|Say which is) {words}(:|,) {{a}} or {{b}}?",
            f"Is {{a}} {words} than {{b}}?",
            f"{{a}} or {{b}}, which is {words}?",
        ),
        a=a,
        b=b,
    )
    best = max(a, b) if bigger else min(a, b)
    verdict = f"so **{best}** is {'bigger' if bigger else 'smaller'}."
    answer = f"{a} and {b}: {_compare_steps(a, b)}, {verdict}"
    return Item("comparing", ("comparing", *sorted((a, b))), question, answer)


def parity(rng: random.Random) -> Item:
    """Even or odd, from the last digit."""
    number = _number(rng)
    question = ask(
        rng,
        (
            "Is {n} (even or odd|odd or even|even|odd|an even number|an odd number)?",
            "(Tell me if|Say whether|Do you know if) {n} is (even or odd|odd or even|even|odd).",
            "{n}(:|,) (even or odd|odd or even)?",
        ),
        n=number,
    )
    kind = "odd" if number % 2 else "even"
    answer = f"{number} ends in {number % 10}, so it is **{kind}**."
    return Item("parity", ("parity", number), question, answer)


_ORDINALS = ("first", "second", "third", "fourth", "fifth")


def _shown(rng: random.Random, values: list) -> str:
    style = rng.random()
    if style < 0.6:
        return ", ".join(map(str, values))
    if style < 0.8:
        return ", ".join(map(str, values[:-1])) + f" and {values[-1]}"
    return " ".join(map(str, values))


_LIST = "(this list|the list|these words|these|the words|)(:|)"


def word_list(rng: random.Random) -> Item:
    """Pick, count, reverse, repeat or search in a few words."""
    words = rng.sample(NOUNS, rng.randint(3, 6))
    shown = _shown(rng, words)
    kind = pick(
        rng, ("nth", "nth", "last", "count", "count", "reverse", "reverse", "repeat", "find")
    )
    nth, wanted = 0, ""
    if kind == "nth":
        nth = pick(rng, (0, 0, 1, 2))
        ordinal = _ORDINALS[nth]
        patterns = (
            f"(What is|What's|Tell me|Which is|Give me) the {ordinal} (word|item|thing|one) (in|"
            f"of) {_LIST} {{l}}?",
            f"(The|) {ordinal} (word|item) (of|in) {{l}}?",
        )
        answer = f"The {ordinal} word is {words[nth]}."
    elif kind == "last":
        patterns = (
            "(What is|What's|Tell me|Which is|Give me) the last (word|item|thing|one) (in|of) "
            f"{_LIST} {{l}}?",
            "(The|) last (word|item) (of|in) {l}?",
        )
        answer = f"The last word is {words[-1]}."
    elif kind == "count":
        patterns = (
            "How many (words|items|things) (are in|are there in|has|does it have|can you count "
            f"in) {_LIST} {{l}}?",
            "(Count the words|Count these words|How many words|Count the items|Count these "
            "things): {l}.",
        )
        numbered = ", ".join(f"{w} {i}" for i, w in enumerate(words, 1))
        answer = f"Let me count: {numbered}. So there are **{len(words)}**."
    elif kind == "reverse":
        patterns = (
            "(Reverse|Turn around|Write backwards|Please reverse|Can you reverse|Reverse the "
            f"order of) {_LIST} {{l}}.",
            "(Write|Say|Give me|Put) {l} (in reverse|in reverse order|backwards|the other way "
            "round).",
        )
        answer = "Reversed: " + ", ".join(reversed(words)) + "."
    elif kind == "repeat":
        patterns = (
            "(Repeat|Repeat after me|Say|Please repeat|Say after me|Copy|Write)(: | ){l}.",
            "(Can you|Could you|Please) (repeat|say) {l}?",
        )
        answer = "Here you go: " + ", ".join(words) + "."
    else:
        wanted = pick(rng, words) if rng.random() < 0.55 else pick(rng, NOUNS)
        patterns = (
            f"Is (the word|) {{w}} in {_LIST} {{l}}?",
            f"Does {_LIST} {{l}} (contain|have|include) {{w}}?",
        )
        there = wanted in words
        answer = f"{'Yes' if there else 'No'}, {wanted} is {'' if there else 'not '}in the list."
    key = ("word_list", kind, nth, wanted, *words)
    return Item("word_list", key, ask(rng, patterns, l=shown, w=wanted), answer)


def number_list(rng: random.Random) -> Item:
    """Sort a few numbers, or find the biggest, the smallest, or how many there are."""
    top = 99 if rng.random() < 0.8 else 20
    numbers = rng.sample(range(1, top + 1), pick(rng, (3, 3, 3, 4, 4, 5)))
    shown = _shown(rng, numbers)
    kind = pick(rng, ("sort", "sort", "sort", "down", "max", "min"))
    ascending = ", ".join(map(str, sorted(numbers)))
    descending = ", ".join(map(str, sorted(numbers, reverse=True)))
    tail = "(these numbers|the numbers|this list|)(:|)"
    if kind == "sort":
        patterns = (
            f"(Sort|Order|Please sort|Can you sort|Arrange|Please order) {tail} {{l}}.",
            f"(Put|Bring) {tail} {{l}} (in order|into order|in the right order).",
            f"(Sort|Order) {tail} {{l}} (from small to big|from low to high|ascending|from "
            "smallest to biggest).",
        )
        answer = f"Sorted: {ascending}."
    elif kind == "down":
        patterns = (
            f"(Sort|Order|Please sort) {tail} {{l}} (from big to small|from high to low|"
            "descending|from biggest to smallest|downwards).",
        )
        answer = f"Sorted down: {descending}."
    elif kind == "max":
        patterns = (
            "(What is|What's|Which is|Find|Tell me) the (biggest|largest|highest|greatest) "
            f"(number|one|) (of|in|among) {tail} {{l}}?",
            f"(Maximum|Biggest) of {tail} {{l}}?",
        )
        answer = f"Sorted: {ascending}. The biggest is **{max(numbers)}**."
    else:
        patterns = (
            "(What is|What's|Which is|Find|Tell me) the (smallest|lowest|least) (number|one|) "
            f"(of|in|among) {tail} {{l}}?",
            f"(Minimum|Smallest) of {tail} {{l}}?",
        )
        answer = f"Sorted: {ascending}. The smallest is **{min(numbers)}**."
    return Item("number_list", ("number_list", kind, *numbers), ask(rng, patterns, l=shown), answer)


TASKS = {
    "counting": (counting, 8.0),
    "long_count": (long_count, 0.4),
    "neighbor": (neighbor, 2.5),
    "comparing": (comparing, 5.0),
    "parity": (parity, 1.6),
    "word_list": (word_list, 8.0),
    "number_list": (number_list, 8.0),
}
