"""Forward passes of several sequences that meet at every call of their experts.

Each sequence runs its own forward, whatever its family, as a coroutine on the engine thread: at an
experts call it steps aside until every other sequence has arrived at the same layer, and then one
call computes that layer for all. So one layer's missing experts move once for everybody, and each
sequence still gets bit for bit what it would get alone.

Switching is greenlet's: the model's own frames stay where they are and nothing leaves the thread,
so that what is thread-local (inference mode, the current stream) holds for all. It is entered once,
around the whole meeting, by whoever calls `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from runtime.layer_rows import RoutedTokens

Result = TypeVar("Result")
RunTogether = Callable[[int, Sequence[RoutedTokens]], list[Tensor]]
"""run_together(layer, one part per sequence) -> the rows of each part, (tokens, hidden)"""
_Arrival = tuple[int, RoutedTokens]


class Meeting:
    """Brings the experts calls of one pass together. The engine thread owns it.

    `current` is the number of the forward that runs, within the pass.
    """

    def __init__(self, run_together: RunTogether) -> None:
        self._run_together = run_together
        self._hub: greenlet | None = None
        self.current = 0

    def experts(self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """Compute one layer's experts for the forward that calls, together with the others'.

        Args:
            layer: index of the MoE layer.
            hidden: (tokens, hidden).
            index: (tokens, k).
            weights: (tokens, k).

        Returns:
            (tokens, hidden).
        """
        part = RoutedTokens(hidden, index, weights)
        if self._hub is None:
            return self._run_together(layer, [part])[0]
        rows: Tensor = self._hub.switch((layer, part))
        return rows

    def run(self, forwards: Sequence[Callable[[], Result]]) -> list[Result | Exception]:
        """Run all forwards to their ends; return what each returned or raised.

        A forward that raises leaves and the others go on. One alone is simply called.
        """
        self.current = 0
        if len(forwards) == 1:
            return [outcome_of(forwards[0])]
        outcomes: list[Result | Exception] = []
        flows = [_flow(forward) for forward in forwards]
        self._hub = getcurrent()
        try:
            outcomes = self._follow(flows)
        finally:
            self._hub = None
            for flow in flows:
                if not flow.dead:  # only if the meeting itself was broken off
                    flow.throw()
        return outcomes

    def _follow(self, flows: Sequence[greenlet]) -> list[Result | Exception]:
        ended: dict[int, Result | Exception] = {}
        arrived: dict[int, _Arrival] = {}

        def resume(number: int, *value: object) -> None:
            """Let a forward run to its next experts call or to its end."""
            self.current = number
            flow = flows[number]
            failed = bool(value) and isinstance(value[0], Exception)
            back = flow.throw(value[0]) if failed else flow.switch(*value)
            if flow.dead:
                ended[number] = back
            else:
                arrived[number] = back

        for number in range(len(flows)):
            resume(number)
        while arrived:
            numbers, calls = list(arrived), list(arrived.values())
            arrived.clear()
            layer = calls[0][0]
            assert all(at == layer for at, _ in calls), "one model's forwards at different layers"
            rows = self._compute(layer, [part for _, part in calls])
            for number, mine in zip(numbers, rows, strict=True):
                resume(number, mine)
        return [ended[number] for number in range(len(flows))]

    def _compute(self, layer: int, parts: Sequence[RoutedTokens]) -> Sequence[Tensor | Exception]:
        """Return each part's rows, or why it has none."""
        rows = self._try(layer, parts)
        if isinstance(rows, torch.OutOfMemoryError) and len(parts) > 1:
            # What does not fit for all may fit for each, and only who is too large has to go.
            del rows  # it holds on to the tensors of the attempt
            alone = [self._try(layer, [part]) for part in parts]
            return [one[0] if isinstance(one, list) else one for one in alone]
        return rows if isinstance(rows, list) else [rows] * len(parts)

    def _try(self, layer: int, parts: Sequence[RoutedTokens]) -> list[Tensor] | Exception:
        return outcome_of(lambda: self._run_together(layer, parts))


def outcome_of(work: Callable[[], Result]) -> Result | Exception:
    """Return what `work` returned or raised: one request's failure must not end the others."""
    try:
        return work()
    except Exception as failure:  # noqa: BLE001  whoever asked for the work decides what it means
        return failure


def _flow(forward: Callable[[], Result]) -> greenlet:
    flow = greenlet(lambda: outcome_of(forward))
    flow.gr_context = copy_context()  # a greenlet starts with an empty one
    return flow
