"""PreSched: what PreScope does with misses and with what it foresees.

After PreScope (arXiv 2509.23638) and what engines have measured since: misses are split between
link and CPU by least makespan; what is foreseen for the next two layers is protected from eviction,
and copied ahead where a copy lands before its layer needs it and is worth more than what it
displaces and what it costs the CPU, which shares host memory with the link. What the CPU computed
is brought in while the link is idle, if it will be used again sooner than what it displaces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from runtime.calibration import Calibration
from runtime.core import ExpertId, PolicyName
from runtime.eviction import make_eviction
from runtime.policy import Moment, PolicySetup, Routed, Wish
from runtime.scheduler import Costs, Miss, MissPlan, split_least_makespan
from runtime.trace import Prediction

LASTING_PASSES = 8.0
KEPT_CANDIDATES = 32
PROTECTED_FROM = 0.25


@dataclass(frozen=True)
class PreScopeSettings:
    """The parts that can be switched off one at a time, for ablation and by the controller."""

    eviction: str = "expected-next-use"
    prefetch: bool = True
    admit: bool = True
    protect: bool = True
    lookahead: int = 2
    constants: bool = True


@dataclass
class _Averages:
    """Moving averages over layers: how long one is served and how the CPU has to do with it."""

    layer_s: float = 0.0
    cpu_s: float = 0.0
    misses: float = 1.0
    seen: bool = False

    def add(self, layer_s: float, cpu_s: float, misses: int) -> None:
        share = 0.05 if self.seen else 1.0
        self.layer_s += share * (layer_s - self.layer_s)
        self.cpu_s += share * (cpu_s - self.cpu_s)
        self.misses += share * (misses - self.misses)
        self.seen = True


@dataclass(frozen=True)
class _Window:
    """When the next two layers will be routed, and when the CPU works until then."""

    now_s: float
    cpu_until_s: float
    next_s: float
    next_cpu_until_s: float
    second_s: float

    def beside_cpu_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of a copy from `begin_s` to `end_s` during which the CPU works as well."""
        now = max(0.0, min(end_s, self.cpu_until_s) - max(begin_s, self.now_s))
        later = max(0.0, min(end_s, self.next_cpu_until_s) - max(begin_s, self.next_s))
        return now + later


class PreScope:
    """The policy `prescope`. One per model; the engine thread owns it."""

    name: PolicyName = "prescope"
    predicts = True

    def __init__(
        self, setup: PolicySetup, settings: PreScopeSettings | None = None, **changes: object
    ) -> None:
        self.settings = settings or PreScopeSettings(**changes)  # type: ignore[arg-type]
        self.eviction = make_eviction(self.settings.eviction, setup.layers)
        self.costs = setup.costs
        self.calibration = Calibration()
        self.look_ahead = True
        self._setup = setup
        self._soon: dict[int, dict[int, float]] = {}
        self._averages = _Averages()
        self._routed_s = 0.0
        self._plan = MissPlan((), ())
        self._cpu_s = 0.0
        self._missed: dict[ExpertId, None] = {}

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        self._soon.clear()
        self._foresee(predictions)
        return self._ahead(-1, self._after_layer(moment), moment)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        self._routed_s = moment.now_s
        self._learn(routed)
        layer = routed.layer
        costs = self._split_costs()
        size = self._setup.layer_bytes[layer]
        busy_s = sum(costs.device_s(size, hit.tokens) for hit in routed.hits)

        def worth(expert: int) -> float:
            return self.eviction.worth(ExpertId(layer, expert), moment.token, layer)

        best: MissPlan | None = None
        best_s = float("inf")
        # What is on its way may be computed on the CPU all the same, the latest to land first.
        for given_up in range(len(routed.coming) + 1):
            awaited, on_cpu = self._split_coming(routed.coming, given_up, layer, moment)
            ahead_s = self._ahead_s(awaited, layer, moment)
            misses = (*routed.misses, *on_cpu)
            plan = split_least_makespan(misses, size, costs, ahead_s, busy_s, worth)
            moved = {miss.expert for miss in on_cpu} & set(plan.load)
            if moved and given_up:
                continue
            tokens = {miss.expert: miss.tokens for miss in misses}
            total_s, _ = self._duration(plan, tokens, size, ahead_s if awaited else 0.0, busy_s)
            if total_s < best_s:
                best, best_s = plan, total_s
        assert best is not None
        self._plan = best
        tokens = {m.expert: m.tokens for m in (*routed.misses, *routed.coming)}
        _, self._cpu_s = self._duration(best, tokens, size, 0.0, busy_s)
        for number in best.cpu:
            self._missed.pop(ExpertId(layer, number), None)
            self._missed[ExpertId(layer, number)] = None
        while len(self._missed) > KEPT_CANDIDATES:
            self._missed.pop(next(iter(self._missed)))
        return best

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        self._foresee(predictions)
        self._soon.pop(routed.layer, None)
        size = self._setup.layer_bytes[routed.layer]
        loads_s = len(plan.load) * self.costs.link_s(size)
        link_s = self._link_free_s(moment) + loads_s
        cpu_until_s = moment.now_s + self._cpu_s
        device_s = sum(self.costs.device_s(size, hit.tokens) for hit in routed.hits)
        waited_s = link_s if plan.load or routed.coming else moment.now_s
        end_s = max(cpu_until_s, moment.now_s, waited_s)
        window = self._window(moment, cpu_until_s, end_s, moment.device_free_s + device_s)
        return self._ahead(routed.layer, window, moment, link_s)

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        missed = len(self._plan.load) + len(self._plan.cpu)
        self._averages.add(moment.now_s - self._routed_s, self._cpu_s, missed)
        if moment.queue.backlog_bytes:
            return ()  # what was wished for beside the layer is not even issued yet
        return self._ahead(layer, self._after_layer(moment), moment)

    def protects(self, expert: ExpertId) -> bool:
        if not self.settings.protect:
            return False
        return self._soon.get(expert.layer, {}).get(expert.expert, 0.0) >= PROTECTED_FROM

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        layer = wish.expert.layer
        theirs = self.eviction.worth(victim, moment.token, layer)
        if wish.use > 0.0:
            return True
        mine = self.eviction.worth(wish.expert, moment.token, layer)
        return mine > theirs

    # What is foreseen.

    def _foresee(self, predictions: Sequence[Prediction]) -> None:
        for prediction in predictions:
            if prediction.distance > self.settings.lookahead:
                continue
            calibrated = self.calibration.note(prediction)
            self._soon[prediction.layer] = calibrated

    def _learn(self, routed: Routed) -> None:
        chosen = {m.expert for group in (routed.hits, routed.coming, routed.misses) for m in group}
        self.calibration.learn(routed.layer, chosen)

    # What is copied ahead.

    def _ahead(
        self, layer: int, window: _Window, moment: Moment, link_s: float | None = None
    ) -> list[Wish]:
        """Choose copies in the order of their deadlines, as long as each is worth its price."""
        wishes: list[Wish] = []
        if not self.look_ahead:
            return wishes
        at_s = self._link_free_s(moment) if link_s is None else link_s
        slower = 1.0 - self.costs.cpu_bytes_per_s_while_copying / self.costs.cpu_bytes_per_s
        for expert, use, deadline_s in self._candidates(layer, window, moment):
            if at_s >= window.second_s:
                break
            copy_s = self.costs.link_s(self._setup.layer_bytes[expert.layer])
            lands_s = at_s + copy_s
            saved_s = self._saved_s(expert.layer)
            gain_s = 0.0
            if use > 0.0:
                late = max(0.0, lands_s - deadline_s) / copy_s
                gain_s = use * saved_s * max(0.0, 1.0 - late)
            gain_s += self._lasting(expert, use, moment) * saved_s
            price_s = slower * window.beside_cpu_s(at_s, lands_s)
            if gain_s > price_s:
                wishes.append(Wish(expert, deadline_s, use))
                at_s = lands_s
        return wishes

    def _candidates(
        self, layer: int, window: _Window, moment: Moment
    ) -> Iterator[tuple[ExpertId, float, float]]:
        """Yield (expert, how likely it is used, by when) that have no slot."""
        if self.settings.prefetch:
            for ahead, deadline_s in ((1, window.next_s), (2, window.second_s)):
                soon = self._soon.get(layer + ahead)
                if not soon or ahead > self.settings.lookahead:
                    continue
                for number, use in sorted(soon.items(), key=lambda item: -item[1]):
                    expert = ExpertId(layer + ahead, number)
                    if not moment.holds(expert):
                        yield expert, use, deadline_s
        if self.settings.admit:
            for expert in reversed(list(self._missed)):
                if moment.holds(expert):
                    del self._missed[expert]
                else:
                    yield expert, 0.0, window.second_s

    def _lasting(self, expert: ExpertId, use: float, moment: Moment) -> float:
        """Uses that a slot will save later, beyond those of whom it displaces."""
        rate = 1.0 / max(1.0, 1.0 - self.eviction.worth(expert, moment.token, expert.layer))
        return LASTING_PASSES * rate * 0.5

    def _saved_s(self, layer: int) -> float:
        """Seconds that one miss less saves a layer with the usual number of misses."""
        size = self._setup.layer_bytes[layer]
        costs = self.costs
        misses = max(1.0, self._averages.misses)
        on_cpu_s = costs.cpu_call_s / misses + size / costs.cpu_bytes_per_s
        return min(on_cpu_s, costs.link_s(size))

    # When what will be.

    def _after_layer(self, moment: Moment) -> _Window:
        return self._window(moment, moment.now_s, moment.now_s, moment.device_free_s)

    def _window(
        self, moment: Moment, cpu_until_s: float, end_s: float, device_free_s: float
    ) -> _Window:
        costs, averages = self.costs, self._averages
        dense_s = costs.dense_s(moment.tokens)
        next_s = max(end_s + costs.host_layer_s, device_free_s) + dense_s
        second_s = next_s + averages.layer_s + costs.host_layer_s + dense_s
        return _Window(moment.now_s, cpu_until_s, next_s, next_s + averages.cpu_s, second_s)

    def _link_free_s(self, moment: Moment) -> float:
        queued_s = moment.queue.backlog_bytes / self.costs.link_bytes_per_s
        return max(moment.now_s, moment.queue.stream_free_s) + queued_s

    def _ahead_s(self, awaited: Sequence[Miss], layer: int, moment: Moment) -> float:
        """Seconds until the link has moved what is demanded of it already."""
        queue = moment.queue
        rest = sum(queue.left_bytes.get(ExpertId(layer, miss.expert), 0) for miss in awaited)
        queued_s = (queue.demanded_bytes + rest) / self.costs.link_bytes_per_s
        return max(0.0, queue.stream_free_s - moment.now_s) + queued_s

    def _split_coming(
        self, coming: Sequence[Miss], given_up: int, layer: int, moment: Moment
    ) -> tuple[Sequence[Miss], Sequence[Miss]]:
        left = moment.queue.left_bytes
        by_rest = sorted(coming, key=lambda miss: left.get(ExpertId(layer, miss.expert), 0))
        kept = len(by_rest) - given_up
        return by_rest[:kept], by_rest[kept:]

    def _duration(
        self,
        plan: MissPlan,
        tokens: dict[int, int],
        size: int,
        ahead_s: float,
        busy_s: float,
    ) -> tuple[float, float]:
        """Return how long a layer takes with this plan, and its CPU work alone, in seconds."""
        costs = self.costs
        link_s = ahead_s + len(plan.load) * costs.link_s(size)
        cpu_s = 0.0
        if plan.cpu:
            work = sum(costs.cpu_work_bytes(size, tokens[number]) for number in plan.cpu)
            shared = min(work, link_s * costs.cpu_bytes_per_s_while_copying)
            cpu_s = costs.cpu_call_s + shared / costs.cpu_bytes_per_s_while_copying
            cpu_s += (work - shared) / costs.cpu_bytes_per_s
        return max(link_s, cpu_s, busy_s), cpu_s

    def _split_costs(self) -> Costs:
        if self.settings.constants:
            return self.costs
        return self.costs.without_constants()
