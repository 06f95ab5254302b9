"""What an engine is put together from, and what it asks of each part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from runtime.core import HardwareProfile, MemoryPlan, ModelShape, Verdict
from runtime.layer_rows import RoutedTokens
from runtime.prompts import Render, Tokenizer
from runtime.sequences import Cache
from runtime.telemetry import Counters


class Executor(Protocol):
    """What the engine asks of the executor of its experts."""

    @property
    def policy(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def slots_used(self) -> int: ...

    @property
    def look_ahead(self) -> bool: ...

    @property
    def verdict(self) -> Verdict | None: ...

    @property
    def stall_s_by_layer(self) -> tuple[float, ...]: ...

    @property
    def ram_experts(self) -> int | None: ...

    def set_policy(self, policy: str) -> None: ...

    def set_prediction(self, on: bool) -> None: ...

    def reset_predictor(self) -> None: ...

    def idle(self, budget_s: float) -> None: ...

    def shrink(self) -> bool: ...

    def begin_pass(self, tokens: int, token_ids: Sequence[int] = (), span: int = 1) -> None: ...

    def run_together(self, layer: int, parts: Sequence[RoutedTokens]) -> list[Tensor]: ...

    def computing(self) -> AbstractContextManager[object]: ...

    def counters(self) -> Counters: ...

    def heat(self) -> bytes: ...


class Device(Protocol):
    """What the engine asks of the device: where tensors go, what time it is, when it is done."""

    torch_device: torch.device

    def now_s(self) -> float: ...

    def wait_for_compute(self) -> None: ...


@dataclass(frozen=True)
class EngineParts:
    """A loaded model and everything it runs on.

    `new_cache` makes an empty KV cache for it; `close` gives all of it back. `remarks` are
    sentences for a person about how it was loaded. `render` runs the tokenizer's chat template
    where it can do no harm; None runs it in this process. `watch_ram` is called between two
    forward passes.
    """

    model: Callable[..., Any]
    tokenizer: Tokenizer
    shape: ModelShape
    context_tokens: int
    eos_token_ids: frozenset[int]
    new_cache: Callable[[], Cache]
    device: Device
    executor: Executor
    profile: HardwareProfile
    plan: MemoryPlan
    close: Callable[[], None]
    remarks: tuple[str, ...] = ()
    render: Render | None = None
    watch_ram: Callable[[], None] = lambda: None
