"""PreSched: what PreScope does with misses and with what it foresees.

After PreScope (arXiv 2509.23638) and what engines have measured since. Misses are split between
link and CPU by least makespan, a fetched expert counting for what it is worth later as well. What
is foreseen for the next two layers is protected from eviction, and copied ahead where a copy is
worth more than what it displaces and what it costs the CPU, which shares host memory with the
link. What the CPU computed is brought in while the link is idle, if it will be used again sooner
than what it displaces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runtime.calibration import Calibration
from runtime.controller import FULL
from runtime.core import ExpertId, PolicyName
from runtime.eviction import make_eviction
from runtime.eviction_frequency import HALF_LIFE_TOKENS
from runtime.policy import Moment, PolicySetup, Routed, Wish
from runtime.policy_windows import Averages, Turnover, Window
from runtime.rails import Rails
from runtime.scheduler import Costs, Miss, MissPlan, split_least_makespan
from runtime.trace import Guess, Prediction

KEPT_CANDIDATES = 32
USE_SHARE = 1.0 - 2.0 ** (-1.0 / HALF_LIFE_TOKENS)
"""What one use adds to an estimated rate of use per pass."""


@dataclass(frozen=True)
class PreScopeSettings:
    """The parts that can be switched off one at a time, for ablation, and what they go by.

    `bonus` weighs what a fetched expert is worth later against this layer's end;
    `protected_from` is the probability of use from which a resident expert is kept;
    `hold_margin` is how much more a copy must bring than it costs the CPU beside it; with the
    link taken by demands for more than `busy_link` of the time nothing is copied ahead.
    """

    eviction: str = "expected-next-use"
    prefetch: bool = True
    admit: bool = False
    protect: bool = True
    lookahead: int = 2
    constants: bool = True
    longest_stay: float = 32.0
    bonus: float = 0.1
    protected_from: float = 0.25
    hold_margin: float = 1.3
    busy_link: float = 0.8
    doubt: float = 1.0


class PreScope:
    """The policy `prescope`. One per model; the engine thread owns it."""

    name: PolicyName = "prescope"
    predicts = True
    copies_ahead = True

    def __init__(self, setup: PolicySetup, **changes: Any) -> None:
        self.settings = PreScopeSettings(**changes)
        self.eviction = make_eviction(self.settings.eviction, setup.layers)
        self.look_ahead = FULL
        self._rails = Rails(setup.costs)
        self._setup = setup
        self._round = (setup.layers - 1) / setup.layers
        self._calibration = Calibration()
        self._soon: dict[int, dict[int, float]] = {}
        self._averages = Averages()
        self._routed_s = 0.0
        self._plan = MissPlan((), ())
        self._cpu_s = 0.0
        self._cpu_work_bytes = 0.0
        self._moved = (0, 0.0)
        self._turnover = Turnover(setup.slots, self.settings.longest_stay)
        self._victim_rate = 0.0
        self._missed: dict[ExpertId, None] = {}

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        self._soon.clear()
        self._turnover.end_pass()
        self._rails.end_pass()
        self._foresee(predictions)
        return self._ahead(-1, self._after_layer(moment), moment)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        self._routed_s = moment.now_s
        chosen = {m.expert for group in (routed.hits, routed.coming, routed.misses) for m in group}
        self._calibration.learn(routed.layer, chosen)
        size = self._setup.layer_bytes[routed.layer]
        busy_s = sum(self.costs.device_s(size, hit.tokens) for hit in routed.hits)
        plan = self._split(routed, moment, size, busy_s)
        tokens = {miss.expert: miss.tokens for miss in (*routed.misses, *routed.coming)}
        _, self._cpu_s = self._duration(plan, tokens, size, 0.0, busy_s)
        work = (self.costs.cpu_work_bytes(size, tokens[number]) for number in plan.cpu)
        self._cpu_work_bytes = sum(work)
        for number in plan.cpu:
            self._missed.pop(ExpertId(routed.layer, number), None)
            self._missed[ExpertId(routed.layer, number)] = None
        while len(self._missed) > KEPT_CANDIDATES:
            self._missed.pop(next(iter(self._missed)))
        self._turnover.admitted += len(plan.load)
        self._plan = replace(plan, hold=bool(plan.cpu) and self._holds())
        return self._plan

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        self._soon.pop(routed.layer, None)
        if moment.prompt and not predictions:
            predictions = self._everyone(routed.layer + 1, moment.tokens)
        self._foresee(predictions)
        size = self._setup.layer_bytes[routed.layer]
        link_s = self._link_free_s(moment)
        if plan.load:
            ahead_s = link_s - moment.now_s
            link_s = moment.now_s + self.costs.link_s(size, len(plan.load), ahead_s)
        cpu_until_s = moment.now_s + self._cpu_s
        device_s = sum(self.costs.device_s(size, hit.tokens) for hit in routed.hits)
        waited_s = link_s if plan.load or routed.coming else moment.now_s
        end_s = max(cpu_until_s, moment.now_s, waited_s)
        window = self._window(moment, cpu_until_s, end_s, moment.device_free_s + device_s)
        return self._ahead(routed.layer, window, moment, link_s)

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        missed = len(self._plan.load) + len(self._plan.cpu)
        moved_s = (
            len(self._plan.load) * self._setup.layer_bytes[layer] / self.costs.link_bytes_per_s
        )
        self._averages.add(moment.now_s, self._routed_s, self._cpu_s, moved_s, missed)
        if moment.queue.unstarted:
            return ()  # there are wishes enough
        return self._ahead(layer, self._after_layer(moment), moment)

    @property
    def costs(self) -> Costs:
        """What the rails cost, as far as serving has shown."""
        return self._rails.costs

    def note_link(self, moved_bytes: int, busy_s: float) -> None:
        moved, busy = moved_bytes - self._moved[0], busy_s - self._moved[1]
        self._moved = (moved_bytes, busy_s)
        planned_s = moved / self.costs.link_bytes_per_s
        self._rails.link.note(planned_s, planned_s, busy)

    def note_cpu(self, seconds: float) -> None:
        costs = self.costs
        least_s = self._cpu_work_bytes / costs.cpu_bytes_per_s
        most_s = costs.cpu_call_s + self._cpu_work_bytes / costs.cpu_bytes_per_s_while_copying
        self._rails.cpu.note(least_s, most_s, seconds)

    def protects(self, expert: ExpertId) -> bool:
        if not self.settings.protect:
            return False
        use = self._soon.get(expert.layer, {}).get(expert.expert, 0.0)
        return use >= self.settings.protected_from

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        theirs = self._rate(victim, moment)
        self._victim_rate += 0.05 * (theirs - self._victim_rate)
        stay = self._turnover.stay_passes
        mine = self._rate(wish.expert, moment)
        if wish.use + stay * (mine - self._upper(theirs)) <= 0.0:
            return False
        self._turnover.admitted += 1
        return True

    # Where misses are served.

    def _split(self, routed: Routed, moment: Moment, size: int, busy_s: float) -> MissPlan:
        """Try how many of the coming experts to wait for; the rest and the misses are split."""
        layer = routed.layer
        costs = self.costs if self.settings.constants else self.costs.without_constants()
        # A free slot is filled at no one's expense.
        saved_s = self._saved_s(layer) * (1.0 if moment.free_slots else self.settings.bonus)

        def worth(expert: int) -> float:
            return self.eviction.worth(ExpertId(layer, expert), moment.token, layer)

        def bonus_s(expert: int) -> float:
            return max(0.0, self._lasting(ExpertId(layer, expert), moment)) * saved_s

        if not routed.coming:
            ahead_s = self._ahead_s((), layer, moment)
            return split_least_makespan(routed.misses, size, costs, ahead_s, busy_s, worth, bonus_s)
        tokens = {miss.expert: miss.tokens for miss in (*routed.misses, *routed.coming)}
        left = moment.queue.left_bytes
        coming = sorted(routed.coming, key=lambda m: left.get(ExpertId(layer, m.expert), 0))
        best, best_s = MissPlan((), ()), float("inf")
        for awaited in range(len(coming), -1, -1):
            ahead_s = self._ahead_s(coming[:awaited], layer, moment)
            plan = split_least_makespan(routed.misses, size, costs, ahead_s, busy_s, worth, bonus_s)
            given_up = tuple(miss.expert for miss in coming[awaited:])
            plan = replace(plan, cpu=(*plan.cpu, *given_up))
            waits_s = ahead_s if awaited else 0.0
            total_s, _ = self._duration(plan, tokens, size, waits_s, busy_s)
            if total_s < best_s:
                best, best_s = plan, total_s
        return best

    def _holds(self) -> bool:
        """Say whether copies ahead should wait while the CPU computes: what they cost it is
        more than what they bring."""
        costs = self.costs
        slower = 1.0 - costs.cpu_bytes_per_s_while_copying / costs.cpu_bytes_per_s
        brings = min(1.0, costs.link_bytes_per_s / costs.cpu_bytes_per_s)
        return brings < self.settings.hold_margin * slower

    # What is copied ahead.

    def _foresee(self, predictions: Sequence[Prediction]) -> None:
        farthest = min(self.settings.lookahead, self.look_ahead)
        for prediction in predictions:
            if prediction.distance <= farthest and prediction.layer < self._setup.layers:
                self._soon[prediction.layer] = self._calibration.note(prediction)

    def _everyone(self, layer: int, tokens: int) -> tuple[Prediction, ...]:
        """A prompt's chunk needs nearly every expert: guess them all."""
        if layer >= self._setup.layers:
            return ()
        count = self._setup.experts[layer]
        use = 1.0 - (1.0 - self._setup.top_k / count) ** tokens
        return (Prediction(layer, 1, tuple(Guess(expert, use) for expert in range(count))),)

    def _ahead(
        self, layer: int, window: Window, moment: Moment, link_s: float | None = None
    ) -> list[Wish]:
        """Choose copies in the order of their deadlines, as long as each is worth its price."""
        wishes: list[Wish] = []
        busy = self._averages.link_share > self.settings.busy_link and not moment.prompt
        if not self.look_ahead or busy:
            return wishes
        at_s = self._link_free_s(moment) if link_s is None else link_s
        slower = 1.0 - self.costs.cpu_bytes_per_s_while_copying / self.costs.cpu_bytes_per_s
        holds, admits = self._holds(), self.settings.admit or moment.free_slots > 0
        for expert, use, deadline_s in self._candidates(layer, window, moment):
            if at_s >= window.second_s:
                break
            copy_s = self._setup.layer_bytes[expert.layer] / self.costs.link_bytes_per_s
            if holds:
                lands_s, price_s = window.lands_held_s(at_s, copy_s), 0.0
            else:
                lands_s = at_s + copy_s
                price_s = slower * window.beside_cpu_s(at_s, lands_s)
            saved_s = self._saved_s(expert.layer)
            in_time = max(0.0, 1.0 - max(0.0, lands_s - deadline_s) / saved_s)
            if not in_time and not admits:
                continue
            uses = use * in_time + self._lasting(expert, moment)
            if uses * saved_s > price_s:
                wishes.append(Wish(expert, deadline_s, use))
                at_s = lands_s
        return wishes

    def _candidates(
        self, layer: int, window: Window, moment: Moment
    ) -> Iterator[tuple[ExpertId, float, float]]:
        """Yield (expert, how likely it is used, by when) that have no slot."""
        if self.settings.prefetch:
            for ahead, deadline_s in ((1, window.next_s), (2, window.second_s)):
                soon = self._soon.get(layer + ahead)
                if not soon:
                    continue
                for number, use in sorted(soon.items(), key=lambda item: -item[1]):
                    expert = ExpertId(layer + ahead, number)
                    if not moment.holds(expert):
                        yield expert, use, deadline_s
        if self.settings.admit or moment.free_slots:
            for expert in reversed(list(self._missed)):
                if moment.holds(expert):
                    del self._missed[expert]
                else:
                    yield expert, 0.0, window.second_s

    def _lasting(self, expert: ExpertId, moment: Moment) -> float:
        """Uses that a slot will save later, beyond those of whom it displaces."""
        theirs = self._upper(self._victim_rate)
        return self._turnover.stay_passes * (self._rate(expert, moment) - theirs)

    def _upper(self, rate: float) -> float:
        """Return a rate that the victim's true one hardly exceeds: rates are decayed counts, so
        their variance is their mean times the weight of one use."""
        return rate + self.settings.doubt * math.sqrt(rate * USE_SHARE)

    def _rate(self, expert: ExpertId, moment: Moment) -> float:
        """Return uses per pass. Worth is minus the passes to the next use, seen from the end of
        the expert's own layer: the way round to that layer is not a lack of use."""
        worth = self.eviction.worth(expert, moment.token, expert.layer)
        return 1.0 / max(1.0, 1.0 - worth - self._round)

    def _saved_s(self, layer: int) -> float:
        """Seconds that one miss less saves a layer with the usual number of misses."""
        size, costs = self._setup.layer_bytes[layer], self.costs
        misses = max(1.0, self._averages.misses)
        on_cpu_s = costs.cpu_call_s / misses + size / costs.cpu_bytes_per_s
        return min(on_cpu_s, costs.link_call_s / misses + size / costs.link_bytes_per_s)

    # When what will be.

    def _after_layer(self, moment: Moment) -> Window:
        return self._window(moment, moment.now_s, moment.now_s, moment.device_free_s)

    def _window(
        self, moment: Moment, cpu_until_s: float, end_s: float, device_free_s: float
    ) -> Window:
        costs, averages = self.costs, self._averages
        dense_s = costs.dense_s(moment.tokens)
        next_s = max(end_s + costs.host_layer_s, device_free_s) + dense_s
        second_s = next_s + averages.layer_s + costs.host_layer_s + dense_s
        return Window(moment.now_s, cpu_until_s, next_s, next_s + averages.cpu_s, second_s)

    def _link_free_s(self, moment: Moment) -> float:
        queued_s = moment.queue.backlog_bytes / self.costs.link_bytes_per_s
        return max(moment.now_s, moment.queue.stream_free_s) + queued_s

    def _ahead_s(self, awaited: Sequence[Miss], layer: int, moment: Moment) -> float:
        """Seconds until the link has moved what is demanded of it already."""
        queue = moment.queue
        rest = sum(queue.left_bytes.get(ExpertId(layer, miss.expert), 0) for miss in awaited)
        queued_s = (queue.demanded_bytes + rest) / self.costs.link_bytes_per_s
        return max(0.0, queue.stream_free_s - moment.now_s) + queued_s

    def _duration(
        self, plan: MissPlan, tokens: dict[int, int], size: int, ahead_s: float, busy_s: float
    ) -> tuple[float, float]:
        """Return how long a layer takes with this plan, and its CPU work alone, in seconds."""
        costs = self.costs
        link_s = costs.link_s(size, len(plan.load), ahead_s) if plan.load else ahead_s
        cpu_s = 0.0
        if plan.cpu:
            work = sum(costs.cpu_work_bytes(size, tokens[number]) for number in plan.cpu)
            shared = min(work, link_s * costs.cpu_bytes_per_s_while_copying)
            cpu_s = costs.cpu_call_s + shared / costs.cpu_bytes_per_s_while_copying
            cpu_s += (work - shared) / costs.cpu_bytes_per_s
        return max(link_s, cpu_s, busy_s), cpu_s
