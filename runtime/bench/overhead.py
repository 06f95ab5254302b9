"""`bench overhead`: our decoding loop beside transformers' own `generate`, in one process.

Three sides take turns, in changing order, on the same prompt and the same number of greedy tokens:
`generate` on the stock model, our loop on that very model (so only the loop differs), and the whole
engine with every expert resident and nothing charged. Reported are ratios of medians to `generate`;
below 1 means faster. Seconds are not: they are this machine's, today.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from runtime.adapter_cache import KvCache
from runtime.adapter_reference import generate_greedy, load_reference
from runtime.assembly import assemble, dtype_for
from runtime.config import model_folder
from runtime.core import Delta, LoadRequest, Message, SamplingParams
from runtime.engine import Engine
from runtime.layer_rows import RoutedTokens
from runtime.telemetry import Counters

ROUNDS = 9
NEW_TOKENS = 48
MESSAGES = [Message("user", "What can you tell me about experts?")]


class _NoExecutor:
    """Stands where the executor would: the stock model computes its own experts."""

    policy = "stock"
    slots = slots_used = 0
    look_ahead = False
    verdict = None
    ram_experts = None
    stall_s_by_layer = ()

    def set_policy(self, policy: str) -> None:
        """There is nothing to place."""

    def set_prediction(self, on: bool) -> None:
        """There is nothing to predict."""

    def reset_predictor(self) -> None:
        """There is nothing to forget."""

    def idle(self, budget_s: float) -> None:
        """There is nothing to learn."""

    def begin_pass(self, tokens: int, token_ids: Sequence[int] = (), span: int = 1) -> None:
        """Nothing is counted."""

    def run_together(self, layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
        raise AssertionError("the stock model computes its own experts")

    def shrink(self) -> bool:
        return False

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def counters(self) -> Counters:
        return Counters()

    def heat(self) -> bytes:
        return b""


class _HostClock:
    """The machine's own time and nothing to wait for."""

    def __init__(self, device: torch.device) -> None:
        self.torch_device = device

    def now_s(self) -> float:
        return time.perf_counter()

    def wait_for_compute(self) -> None:
        """The CPU computes at once."""


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the ratios, and whether all sides gave the same tokens."""
    new_tokens = min(options.max_new_tokens, NEW_TOKENS)
    folder = model_folder(options.model)
    say("Loading the model twice\n")
    resident = LoadRequest(options.model, "on-demand", cache_fraction=1.0)
    assembled = assemble(resident, virtual_clock=True)
    engine = Engine(replace(assembled.parts, eos_token_ids=frozenset()))
    stock = load_reference(folder, dtype_for(engine.profile))
    loop = _loop_over(engine, stock)
    prompt = engine.prompt_ids(MESSAGES)
    sides: dict[str, Callable[[], list[int]]] = {
        "generate": lambda: generate_greedy(stock, prompt, new_tokens),
        "loop": lambda: _answer(loop, new_tokens),
        "engine": lambda: _answer(engine, new_tokens),
    }
    tokens = {name: side() for name, side in sides.items()}
    assert all(len(ids) == new_tokens for ids in tokens.values())
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(ROUNDS):
        say(f"Round {number + 1} of {ROUNDS}\n")
        order = list(sides) if number % 2 else list(reversed(sides))
        for name in order:
            began_s = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - began_s)
    engine.close()
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {
        "model": options.model,
        "new_tokens": new_tokens,
        "rounds": ROUNDS,
        "same_tokens": {name: tokens[name] == tokens["generate"] for name in ("loop", "engine")},
        "time_ratio_to_generate": {
            name: medians[name] / medians["generate"] for name in ("loop", "engine")
        },
        "spread": {
            name: (max(taken) - min(taken)) / medians[name] for name, taken in times.items()
        },
    }


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    ratio, same = result["time_ratio_to_generate"], result["same_tokens"]
    lines = [f"Time for {result['new_tokens']} greedy tokens as a ratio to transformers' generate:"]
    for name, what in (("loop", "our loop, its model"), ("engine", "our engine, all resident")):
        tokens = "same tokens" if same[name] else "other tokens"
        lines.append(f"{what:26} {ratio[name]:.2f}  ({tokens})")
    return "\n".join(lines) + "\n"


def _loop_over(engine: Engine, stock: Any) -> Engine:
    """Return an engine whose model is transformers' own, experts included."""
    parts = replace(
        engine.parts,
        model=stock,
        new_cache=lambda: KvCache(stock.config),
        device=_HostClock(engine.parts.device.torch_device),
        executor=_NoExecutor(),
    )
    return Engine(parts)


def _answer(engine: Engine, new_tokens: int) -> list[int]:
    """Generate without reusing the last round: `generate` starts from nothing as well."""
    engine.forget()
    params = SamplingParams(max_new_tokens=new_tokens)
    chunks = engine.generate("bench", MESSAGES, params)
    return [i for chunk in chunks if isinstance(chunk, Delta) for i in chunk.token_ids]
