"""Forwards that meet at their experts: one call a layer, each its own rows, each its own end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar

import greenlet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.layer_rows import RoutedTokens
from runtime.meeting import Meeting

LAYERS = 4
INDEX, WEIGHTS = torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
Fault = Callable[[int, Sequence[RoutedTokens]], None]


class Experts:
    """Doubles every row and notes who met where."""

    def __init__(self, fault: Fault = lambda layer, parts: None) -> None:
        self.fault = fault
        self.calls: list[tuple[int, list[float]]] = []

    def run_together(self, layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
        self.calls.append((layer, [float(part.hidden_states[0, 0]) for part in parts]))
        self.fault(layer, parts)
        return [part.hidden_states * 2 for part in parts]


def forward(meeting: Meeting, value: float, fails_at: int = LAYERS) -> Callable[[], float]:
    def run() -> float:
        hidden = torch.full((1, 1), value)
        for layer in range(LAYERS):
            if layer == fails_at:
                raise ValueError(f"{value}")
            hidden = meeting.experts(layer, hidden, INDEX, WEIGHTS)
        return float(hidden[0, 0])

    return run


@settings(deadline=None)
@given(st.lists(st.integers(0, LAYERS), min_size=1, max_size=16))
def test_each_gets_its_own_result_and_nobody_pays_for_another(ends: list[int]) -> None:
    experts = Experts()
    meeting = Meeting(experts.run_together)
    outcomes = meeting.run([forward(meeting, float(n), at) for n, at in enumerate(ends)])
    for number, (at, outcome) in enumerate(zip(ends, outcomes, strict=True)):
        if at == LAYERS:
            assert outcome == number * 2.0**LAYERS
        else:
            assert isinstance(outcome, ValueError)
    wanted = [
        (layer, [n * 2.0**layer for n, at in enumerate(ends) if at > layer])
        for layer in range(LAYERS)
    ]
    assert experts.calls == [(layer, values) for layer, values in wanted if values]


def test_one_alone_never_leaves_its_thread_of_control() -> None:
    meeting = Meeting(Experts().run_together)
    here = greenlet.getcurrent()
    assert meeting.run([lambda: greenlet.getcurrent() is here]) == [True]


def test_who_runs_is_known_at_every_moment() -> None:
    meeting = Meeting(Experts().run_together)
    seen: list[tuple[int, int]] = []

    def run(number: int) -> None:
        for layer in range(LAYERS):
            seen.append((number, meeting.current))
            meeting.experts(layer, torch.ones(1, 1), INDEX, WEIGHTS)
            seen.append((number, meeting.current))

    meeting.run([lambda n=n: run(n) for n in range(3)])  # type: ignore[misc]
    assert len(seen) == 3 * 2 * LAYERS
    assert all(number == current for number, current in seen)


def test_experts_that_fail_fail_everybody_who_needed_them() -> None:
    def fault(layer: int, parts: Sequence[RoutedTokens]) -> None:
        if layer == 2:
            raise RuntimeError("boom")

    experts = Experts(fault)
    meeting = Meeting(experts.run_together)
    outcomes = meeting.run([forward(meeting, 1.0, 1), forward(meeting, 2.0), forward(meeting, 3.0)])
    assert [type(outcome) for outcome in outcomes] == [ValueError, RuntimeError, RuntimeError]


def test_experts_too_large_for_all_are_computed_for_each() -> None:
    def fault(layer: int, parts: Sequence[RoutedTokens]) -> None:
        largest = max(float(part.hidden_states[0, 0]) for part in parts)
        if layer == 2 and (len(parts) > 1 or largest > 10):
            raise torch.OutOfMemoryError("2 GiB")

    experts = Experts(fault)
    meeting = Meeting(experts.run_together)
    outcomes = meeting.run([forward(meeting, float(n)) for n in (1, 2, 3)])
    assert outcomes[:2] == [16.0, 32.0]
    assert isinstance(outcomes[2], torch.OutOfMemoryError)
    assert experts.calls[-1] == (3, [8.0, 16.0])


def test_forwards_at_different_layers_are_a_mistake_of_ours() -> None:
    meeting = Meeting(Experts().run_together)

    def other() -> None:
        meeting.experts(1, torch.ones(1, 1), INDEX, WEIGHTS)

    with pytest.raises(AssertionError, match="different layers"):
        meeting.run([forward(meeting, 1.0), other])
    assert meeting.run([forward(meeting, 1.0)]) == [16.0]


class Held:
    pass


def test_a_meeting_that_is_broken_off_leaves_nothing_behind() -> None:
    def fault(layer: int, parts: Sequence[RoutedTokens]) -> None:
        if layer == 2:
            raise KeyboardInterrupt

    experts = Experts(fault)
    meeting = Meeting(experts.run_together)
    unwound: list[int] = []
    held: list[weakref.ref[Held]] = []

    def run(number: int) -> None:
        mine = Held()
        held.append(weakref.ref(mine))
        try:
            forward(meeting, float(number))()
        finally:
            unwound.append(number)

    with pytest.raises(KeyboardInterrupt):
        meeting.run([lambda n=n: run(n) for n in range(3)])  # type: ignore[misc]
    assert unwound == [0, 1, 2]
    gc.collect()
    assert [one() for one in held] == [None] * 3
    experts.fault = lambda layer, parts: None
    assert meeting.run([forward(meeting, 1.0), forward(meeting, 2.0)]) == [16.0, 32.0]


WHERE: ContextVar[str] = ContextVar("WHERE", default="nowhere")


def test_what_is_the_threads_own_holds_for_everybody() -> None:
    modes: list[tuple[bool, bool, str]] = []

    def note() -> None:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), WHERE.get()))

    meeting = Meeting(Experts(lambda layer, parts: note()).run_together)

    def run() -> float:
        note()
        result = forward(meeting, 1.0)()
        note()
        return result

    token = WHERE.set("outside")
    try:
        with torch.inference_mode():
            meeting.run([run, run, run])
    finally:
        WHERE.reset(token)
    assert len(modes) == 2 * 3 + LAYERS
    assert set(modes) == {(True, False, "outside")}
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
