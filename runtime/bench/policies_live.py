"""`bench policies --live`: the default model itself on the emulated card, under a virtual clock.

The engine answers a fixed list of questions, `batch` of them at any time: when one answer ends the
next question joins. What counts is modelled time of the passes in which everybody decodes, after
the first questions have filled the caches. Answers are the same whatever the policy.
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from runtime.core import POLICIES, Message, PolicyName, SamplingParams

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.engine_generation import Generation
    from runtime.telemetry import Counters

BATCHES = (1, 4, 16)
CACHE_FRACTION = 0.25
NEW_TOKENS = 40
WARM_QUESTIONS = 8
OURS: PolicyName = "prescope"
LEFT_OUT = ("cpu-only", "oracle")
"""Not rivals: the card unused, and a policy that needs the future."""

QUESTIONS = (
    "What is an expert?",
    "Add 47 and 58.",
    "Hello!",
    "Tell me a story about a fox and a lamp.",
    "How many minutes are 3 hours?",
    "What does the panel show?",
    "Sort 9, 4, 7.",
    "What is 12 times 7?",
    "Who are you?",
    "Subtract 19 from 64.",
    "Count from 3 to 9.",
    "What is a cache hit?",
    "Which is larger, 81 or 18?",
    "Tell me a story about a boat.",
    "How many centimetres are 4 metres?",
    "What is a miss?",
    "What is 84 divided by 7?",
    "My name is Ada. What is my name?",
    "Why is the link slow?",
    "Good evening!",
    "What is 35 plus 66?",
    "What is prefetching?",
    "Tell me a story about a bear and a bell.",
    "Count down from 8 to 2.",
    "How many grams are 2 kilograms?",
    "Can you work offline?",
    "Sort 15, 2, 11.",
    "What is 9 times 8?",
    "What colour is the sky?",
    "What is 100 minus 37?",
    "How do you choose experts?",
    "Thank you!",
)


def run_live(options: argparse.Namespace, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Return one row per batch and policy."""
    from runtime.assembly import assemble
    from runtime.commands.request import load_request

    fraction = options.cache_fraction or (None if options.vram else CACHE_FRACTION)
    request = replace(load_request(options), cache_fraction=fraction)
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        measured = {}
        for policy in (name for name in POLICIES if name not in LEFT_OUT):
            say(f"Batch {batch}, {policy}\n")
            engine = assemble(replace(request, policy=policy), virtual_clock=True)
            try:
                measured[policy] = serve(engine, batch)
            finally:
                engine.close()
        rivals = [row["tokens_per_s"] for name, row in measured.items() if name != OURS]
        for policy, row in measured.items():
            ratio = row["tokens_per_s"] / max(rivals)
            rows.append({"batch": batch, "policy": policy, **row, "ratio_to_best_rival": ratio})
    return rows


def tell_live(rows: Sequence[dict[str, Any]]) -> str:
    """Put the rows into a table."""
    if not rows[0]["emulated"]:
        head = f"The default model on {rows[0]['device']}:"
    else:
        head = f"The default model on the {rows[0]['device']}, emulated, modelled time:"
    lines = [head, f"{'batch':>5}  {'policy':14}{'tok/s':>8}{'best rival':>12}{'hits':>6}"]
    lines += [
        f"{row['batch']:5}  {row['policy']:14}{row['tokens_per_s']:8.2f}"
        f"{row['ratio_to_best_rival']:12.3f}{row['hit_rate']:6.2f}"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def serve(engine: Engine, batch: int) -> dict[str, Any]:
    """Answer all questions, `batch` at a time; return the speed and the counters of decoding."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    waiting = deque(enumerate((*QUESTIONS, *QUESTIONS)))
    running: list[Generation] = []
    tokens, seconds, passes = 0, 0.0, 0
    device, executor = engine.parts.device, engine.parts.executor
    gained: Counters | None = None
    while True:
        running = [one for one in running if not one.over]
        while waiting and len(running) < batch:
            number, text = waiting.popleft()
            running.append(engine.submit(f"bench {number}", [Message("user", text)], params))
        if len(running) < batch:
            break  # the last answers would decode alone
        decodes = not any(one.prefilling for one in running)
        warm = len(QUESTIONS) * 2 - len(waiting) - len(running) >= WARM_QUESTIONS
        before, before_s = sum(one.timing.new_tokens for one in running), device.now_s()
        counters = executor.counters()
        engine.step()
        if decodes and warm:
            tokens += sum(one.timing.new_tokens for one in running) - before
            seconds += device.now_s() - before_s
            passes += 1
            more = executor.counters().since(counters)
            gained = more if gained is None else _sum(gained, more)
    assert gained is not None
    return {
        "emulated": engine.profile.emulated,
        "device": engine.profile.device_name,
        "tokens_per_s": tokens / seconds,
        "tokens_per_pass": tokens / passes,
        "hit_rate": gained.hit_rate,
        "stall_s": gained.stall_s / passes,
        "link_bytes_per_token": gained.link_bytes_issued / tokens,
        "slots": executor.slots,
    }


def _sum(one: Counters, other: Counters) -> Counters:
    return replace(one, **{name: value + getattr(other, name) for name, value in vars(one).items()})
