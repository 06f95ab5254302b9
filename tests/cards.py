"""One body of tests over three cards: the emulated one, `CudaDevice` over a stand-in, a real one.

The first two run everywhere, so that what is to be run on the day there is a card is run before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.device import Device
from runtime.device_emulated import EmulatedDevice
from runtime.errors import TransferError
from runtime.executor import Executor
from runtime.telemetry import Counters
from tests.cuda_stand_in import cuda_device
from tests.machines import emulated_profile
from tests.test_equivalence import NEXT, PROMPT

CARDS = ["emulated", "stand-in", pytest.param("cuda", marks=pytest.mark.gpu)]
PROFILE = emulated_profile()
CARD_PROFILE = emulated_profile(link_bytes_per_s=25e9, cpu_bytes_per_s=55e9)
"""Rates of a desktop card; on the card itself they only steer the split."""
CPU_BOUND = 1e-4
"""How far logits may move in float32 when a real card's CPU computes some of the experts."""
VRAM_BYTES = 4 << 30


class Card:
    """One kind of card, with which a test opens devices."""

    def __init__(self, kind: str, patch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        self.real = kind == "cuda"
        self.virtual = kind == "emulated"
        self.profile = CARD_PROFILE if self.real else PROFILE
        self.patch = patch
        self.where = torch.device("cuda" if self.real else "cpu")

    def open(self, *, pinned: bool = True) -> Device:
        """Return a device; unless `pinned`, one that the system lets pin nothing."""
        profile = self.profile if pinned else replace(self.profile, pinnable_bytes=0)
        if self.kind == "emulated":
            device = EmulatedDevice(profile, virtual_clock=True)
            device.is_pinned = lambda host: pinned  # type: ignore[method-assign]
            return device
        if self.kind == "stand-in":
            opened, log = cuda_device(self.patch, profile)
            log.may_pin = lambda size_bytes: pinned
            found: Device = opened
            return found
        from runtime.device_cuda import CudaDevice

        real = CudaDevice(profile, VRAM_BYTES)
        if not pinned:  # small blocks are pinned all the same, and these are small
            self.patch.setattr(real, "_may_pin", lambda size_bytes: False)
        return real

    @contextmanager
    def executing(
        self, loaded: Any, device: Device, policy: str, slots: int, **options: Any
    ) -> Iterator[Executor]:
        """Attach an executor to a loaded model; `options` are the executor's."""
        layers, store = options.pop("layers", loaded.layers), options.pop("store", loaded.store)
        executor = Executor(
            device,
            layers,
            store,
            self.profile,
            slots,
            policy,  # type: ignore[arg-type]
            virtual_clock=self.virtual,
            **options,
        )
        attach(loaded.layers, executor.run)
        try:
            yield executor
        finally:
            executor.close()


def answer(model: Any, executor: Executor | None = None, between: Any = None) -> list[torch.Tensor]:
    """Logits of two prompts, of a token after each, and of a single sequence, on the CPU.

    `between` is called before every pass but the first.
    """
    where = next(model.parameters()).device
    found: list[torch.Tensor] = []
    with torch.inference_mode(), executor.computing() if executor else nullcontext():
        for sequences in ((PROMPT, NEXT, NEXT), (PROMPT[:1, :5], NEXT[:1], NEXT[1:])):
            past = None
            for ids in sequences:
                if between is not None and found:
                    between()
                if executor is not None:
                    executor.begin_pass(ids.numel(), span=ids.shape[1])
                output = model(input_ids=ids.to(where), past_key_values=past, use_cache=True)
                past = output.past_key_values
                found.append(output.logits.cpu())
    return found


def assert_agree(
    card: Card, ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], counters: Counters
) -> None:
    """Bit for bit, but within a bound where a real card's CPU computed some of the experts."""
    assert sum(counters.served) == counters.routed > 0
    assert_closes(counters)
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.isfinite(reference).all()
        assert reference.float().std() > 1e-3, "degenerate logits prove nothing"
        difference = (mine - reference).abs().max().item()
        if card.real and counters.served_cpu:
            assert difference < CPU_BOUND
        else:
            assert torch.equal(mine, reference), f"largest difference {difference:.2e}"


def assert_closes(counters: Counters) -> None:
    """Every byte that went over the link is accounted for."""
    assert counters.link_bytes_issued == (
        counters.link_bytes_on_demand
        + counters.link_bytes_prefetch_used
        + counters.link_bytes_prefetch_late
        + counters.link_bytes_prefetch_wasted
        + counters.link_bytes_cancelled
        + counters.link_bytes_failed
        + counters.link_bytes_pending
    )


def failing_every_third_copy(device: Device) -> None:
    """Plant failures of the link."""
    copy, copies = device.copy, 0

    def failing(*args: Any) -> Any:
        nonlocal copies
        copies += 1
        if copies % 3 == 0:
            raise TransferError("a planted failure")
        return copy(*args)

    device.copy = failing  # type: ignore[method-assign]
