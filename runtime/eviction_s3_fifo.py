"""S3-FIFO: three queues, quick demotion of what was used only once.

The algorithm of Yang, Zhang, Qiu, Yue and Vigfusson, "FIFO queues are all you need for cache
eviction" (SOSP 2023). A newcomer enters a small queue of a tenth of the slots; one that is used
again before it reaches the end goes on to the main queue, the others leave and are remembered in a
ghost queue for a while. What comes back while it is remembered enters the main queue at once,
where every use, three at most, buys another round.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from runtime.core import ExpertId
from runtime.eviction import Eviction

SMALL_SHARE = 0.1
MOST_USES = 3


class S3Fifo(Eviction):
    """Queues are ordered oldest first and map each expert to its uses since it came in.

    The number of slots is what the queues hold when a victim is asked for, because that is when
    no slot is free. A prefetched expert's first use is the request that an on-demand load would
    have been, and does not count.
    """

    def __init__(self) -> None:
        self._small: OrderedDict[ExpertId, int] = OrderedDict()
        self._main: OrderedDict[ExpertId, int] = OrderedDict()
        self._ghost: OrderedDict[ExpertId, None] = OrderedDict()
        self._probation: set[ExpertId] = set()

    def used(self, expert: ExpertId, now: float, weight: float = 1.0) -> None:
        if expert in self._probation:
            self._probation.remove(expert)
            return
        queue = self._small if expert in self._small else self._main
        if expert in queue:
            queue[expert] = min(queue[expert] + 1, MOST_USES)

    def admitted(self, expert: ExpertId, now: float, *, prefetched: bool) -> None:
        assert expert not in self._small, f"{expert} has a slot already"
        assert expert not in self._main, f"{expert} has a slot already"
        if expert in self._ghost:
            del self._ghost[expert]
            self._main[expert] = 0
        else:
            self._small[expert] = 0
        if prefetched:
            self._probation.add(expert)

    def removed(self, expert: ExpertId) -> None:
        self._probation.discard(expert)
        if expert in self._main:
            del self._main[expert]
            return
        del self._small[expert]
        self._ghost[expert] = None
        while len(self._ghost) > self._main_slots(1):
            self._ghost.popitem(last=False)

    def victim(self, may_go: Callable[[ExpertId], bool], now: float, layer: int) -> ExpertId | None:
        slots = len(self._small) + len(self._main)
        if len(self._small) >= SMALL_SHARE * slots:
            return self._from_small(may_go) or self._from_main(may_go)
        return self._from_main(may_go) or self._from_small(may_go)

    def worth(self, expert: ExpertId, now: float, layer: int) -> float:
        """Return the queue and the uses as one figure.

        An absent expert is worth more than a victim: this rule filters what comes in by its small
        queue and never by refusing it.
        """
        if expert in self._small:
            return self._small[expert] / 4
        if expert in self._main:
            return 0.5 + self._main[expert] / 4
        return 1.5 if expert in self._ghost else 1.0

    def _main_slots(self, leaving: int = 0) -> int:
        slots = len(self._small) + len(self._main) + leaving
        return max(1, round((1 - SMALL_SHARE) * slots))

    def _from_small(self, may_go: Callable[[ExpertId], bool]) -> ExpertId | None:
        """Return the oldest that was used at most once; move those used more to the main queue."""
        while (expert := next(filter(may_go, self._small), None)) is not None:
            if self._small[expert] <= 1:
                return expert
            del self._small[expert]
            self._main[expert] = 0
            if len(self._main) > self._main_slots():
                found = self._from_main(may_go)
                if found is not None:
                    return found
        return None

    def _from_main(self, may_go: Callable[[ExpertId], bool]) -> ExpertId | None:
        """Return the oldest without a use; one that has some loses one and goes to the back."""
        while (expert := next(filter(may_go, self._main), None)) is not None:
            if not self._main[expert]:
                return expert
            self._main[expert] -= 1
            self._main.move_to_end(expert)
        return None
