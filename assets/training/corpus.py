"""The chat corpus: every task with its weight, and the dialogs made of them.

Everything is a pure function of a seed. Training draws only keys the held-out rule lets
through; the evaluation draws only the others.
"""

from __future__ import annotations

import hashlib
import random
from itertools import accumulate

from assets.training import (
    arithmetic,
    courtesy,
    glossary,
    howto,
    identity,
    knowledge,
    lists,
    refusals,
    stories,
)
from assets.training.items import Item, Task, is_held_out, pick
from assets.training.memory import draw_memory, draw_unknown

Turn = tuple[str, str]
Dialog = list[Turn]

TASKS: dict[str, tuple[Task, float]] = {
    **glossary.TASKS,
    **howto.TASKS,
    **identity.TASKS,
    **refusals.TASKS,
    **courtesy.TASKS,
    **arithmetic.TASKS,
    **lists.TASKS,
    **stories.TASKS,
    **knowledge.TASKS,
}

CLASSES: dict[str, tuple[str, ...]] = {
    "app": ("term", "difference", "hit_rate", "how_to"),
    "identity": ("about", "refusal", "hard_sum"),
    "addition": ("addition",),
    "subtraction": ("subtraction",),
    "multiplication": ("multiplication",),
    "units": ("unit",),
    "counting": ("counting", "neighbor"),
    "comparisons and lists": ("comparing", "parity", "word_list", "number_list"),
    "memory": ("memory",),
    "stories": ("story", "story", "note"),
    "greetings": ("courtesy",),
    "division": ("division",),
    "general facts": ("knowledge",),
}
"""What the evaluation reports: class name -> the tasks in it."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the built-in model of PreScope.",
    "You are PreScope's small built-in assistant. Answer briefly.",
    "Answer briefly.",
    "Be kind and short.",
    "You are a friendly assistant that helps the user.",
    "You are a helpful, honest assistant. If you do not know, say so.",
)

_NAMES = tuple(TASKS)
_CUMULATIVE = tuple(accumulate(TASKS[name][1] for name in _NAMES))
_SHORT = tuple(n for n in _NAMES if n not in ("story", "multiplication"))
_SHORT_CUMULATIVE = tuple(accumulate(TASKS[name][1] for name in _SHORT))


def draw(rng: random.Random, task: str | None = None, held_out: bool = False) -> Item:
    """One item on the wanted side of the split, of one task or of the whole mixture."""
    while True:
        name = task or rng.choices(_NAMES, cum_weights=_CUMULATIVE)[0]
        item = TASKS[name][0](rng)
        if is_held_out(item.key) == held_out:
            return item


def _distractors(rng: random.Random, count: int, held_out: bool = False) -> Dialog:
    turns: Dialog = []
    for _ in range(count):
        item = draw(rng, rng.choices(_SHORT, cum_weights=_SHORT_CUMULATIVE)[0], held_out)
        turns += [("user", item.question), ("assistant", item.answer)]
    return turns


def memory_dialog(rng: random.Random, held_out: bool = False) -> tuple[Dialog, list[tuple]]:
    """One to three facts told, other talk between, and the facts asked for again."""
    memories, turns = [], []
    for _ in range(pick(rng, (1, 1, 1, 2, 2, 3))):
        memory = draw_memory(rng, held_out, exclude=tuple(m.slot for m in memories))
        memories.append(memory)
        turns += [("user", memory.told), ("assistant", memory.reply)]
        turns += _distractors(rng, pick(rng, (0, 0, 1)))
    turns += _distractors(rng, pick(rng, (0, 0, 1, 1, 2, 3)))
    rng.shuffle(memories)
    for memory in memories:
        turns += [("user", memory.question), ("assistant", memory.answer)]
        turns += _distractors(rng, pick(rng, (0, 0, 0, 1)))
    return turns, [memory.key for memory in memories]


def memory_item(rng: random.Random) -> Item:
    """One held-out fact with one to three turns of other talk before the question."""
    other = draw_memory(rng, False)
    memory = draw_memory(rng, True, exclude=(other.slot,))
    before = [("user", memory.told), ("assistant", memory.reply)]
    if rng.random() < 0.5:
        before += [("user", other.told), ("assistant", other.reply)]
    before += _distractors(rng, rng.randint(1, 3))
    return Item("memory", memory.key, memory.question, memory.answer, tuple(before))


def dialog(rng: random.Random) -> Dialog:
    """One training chat."""
    turns: Dialog = []
    if rng.random() < 0.3:
        turns.append(("system", pick(rng, SYSTEM_PROMPTS)))
    if rng.random() < 0.15:
        greeting = draw(rng, "courtesy")
        turns += [("user", greeting.question), ("assistant", greeting.answer)]
    kind = rng.random()
    if kind < 0.36:
        turns += memory_dialog(rng)[0]
    elif kind < 0.40:
        turns += _distractors(rng, pick(rng, (0, 1, 2)))
        question, answer = draw_unknown(rng)
        turns += [("user", question), ("assistant", answer)]
    elif kind < 0.44:
        for _ in range(rng.randint(2, 5)):
            turns += memory_dialog(rng)[0] if rng.random() < 0.3 else _distractors(rng, 2)
    else:
        for _ in range(pick(rng, (1, 1, 2, 2, 3, 4))):
            item = draw(rng)
            turns += [("user", item.question), ("assistant", item.answer)]
    return turns


def evaluation_item(rng: random.Random, task: str) -> Item:
    """One item that training never sees."""
    return memory_item(rng) if task == "memory" else draw(rng, task, held_out=True)


def digest() -> str:
    """A short name for this edition of the corpus: a hash of the dialogs it makes of one seed."""
    rng = random.Random(0)
    text = "\n".join(f"{role}: {text}" for _ in range(2000) for role, text in dialog(rng))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
