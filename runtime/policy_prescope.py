"""PreSched: what PreScope does with misses and with what it foresees.

After PreScope (arXiv 2509.23638) and what engines have measured since. Misses are split between
link and CPU by least makespan, a fetched expert counting for what it is worth later as well. What
is foreseen for the next two layers is protected from eviction, and copied ahead where a copy is
worth more than what it displaces and what it costs the CPU, which shares host memory with the
link. Where the CPU works most of the time and a copy beside it costs it more than a guess can
bring, an idle link brings in what the CPU computed and will be used more often than what it
displaces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.controller import FULL
from runtime.core import ExpertId, PolicyName
from runtime.eviction_table import make_eviction
from runtime.policy import Moment, PolicySetup, Routed, Wish
from runtime.policy_foresight import Foresight
from runtime.policy_hopes import Hopes
from runtime.policy_slot_value import SlotValue
from runtime.policy_windows import Averages, Copies, Turnover, Window, Worth, choose
from runtime.rails import Rails
from runtime.scheduler import Costs, MissPlan, Split, split_least_makespan
from runtime.trace import Prediction

KEPT_CANDIDATES = 8
COMPARE_EVERY = 4
"""In every how manyth layer it is found out who would have to go: that changes little between,
unless it went."""
NOTHING_ROUTED = Routed(-1, {}, np.empty(0, np.int64), (), (), ())
MOST_RESTS = 3
"""Where nothing was worth copying ahead for a while, that is looked at more rarely: at every
fourth opportunity in the end."""
NO_MISSES = MissPlan((), ())
WHENEVER_S = 1e3
"""The deadline of a copy that no layer waits for: behind all that some layer does."""


@dataclass(frozen=True)
class PreScopeSettings:
    """The parts that can be switched off one at a time, for ablation, and what they go by.

    `bonus` weighs what a fetched expert is worth later against this layer's end;
    `protected_from` is the probability of use from which a resident expert is kept; a copy for a
    layer to come needs `least_use` beyond what it displaces, because it empties a slot before it
    fills it; `margin` is how much more a copy must bring than it costs the CPU beside it, and
    `hold_margin` is that from which on copies wait while the CPU computes. `check` multiplies what
    slots and copies ahead are worth by how much of it came true before.
    """

    eviction: str = "expected-next-use"
    prefetch: bool = True
    admit: bool = True
    protect: bool = True
    check: bool = True
    lookahead: int = 2
    constants: bool = True
    longest_stay: float = 16.0
    bonus: float = 0.5
    protected_from: float = 0.15
    least_use: float = 0.3
    margin: float = 2.0
    hold_margin: float = 1.3


class PreScope:
    """The policy `prescope`. One per model; the engine thread owns it."""

    name: PolicyName = "prescope"
    predicts = True
    copies_ahead = True

    def __init__(self, setup: PolicySetup, **changes: Any) -> None:
        self.settings = PreScopeSettings(**changes)
        self.eviction = make_eviction(self.settings.eviction, setup.experts)
        self.look_ahead = FULL
        self._rails = Rails(setup.costs)
        self._plan_with(setup.costs)
        self._setup = setup
        self._value = SlotValue(self.eviction, setup.experts, self.settings.check)
        spared_from = self.settings.protected_from if self.settings.protect else math.inf
        self._foresight = Foresight(self.eviction, setup, spared_from)
        self._averages = Averages()
        self._routed_s = 0.0
        self._routed, self._learns = NOTHING_ROUTED, False
        self._plan = NO_MISSES
        self._cpu_s = 0.0
        self._cpu_work_bytes = 0.0
        self._moved = (0, 0.0)
        self._turnover = Turnover(setup.slots, self.settings.longest_stay)
        self._admitting: ExpertId | None = None
        self._missed: list[ExpertId] = []
        self._hopes = Hopes(self.settings.check)
        self._fruitless = self._rests = 0
        self._compare_every, self._most_rests = COMPARE_EVERY, MOST_RESTS

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        self._foresight.begin_pass()
        self._turnover.end_pass()
        self._value.stay_for(self._turnover.stay_passes)
        if not moment.prompt:
            self._value.end_pass()
        self._rails.end_pass()
        self._plan_with(self._rails.costs)
        self._foresee(predictions)
        return self._ahead(-1, self._after_layer(moment), moment)

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        self._routed_s = moment.now_s
        self._routed, self._learns = routed, not moment.prompt
        self._value.used(routed.layer, routed.chosen, moment.token, moment.prompt)
        self._hopes.routed(routed, moment, self._setup.layer_bytes[routed.layer])
        self._cpu_s = self._cpu_work_bytes = 0.0
        self._plan = NO_MISSES
        if not (routed.misses or routed.coming):
            return self._plan
        if routed.misses:
            known = self._value.victim
            if routed.layer % self._compare_every == 0 or known is None or not moment.holds(known):
                self._compare_with_victim(routed, moment)
        size = self._setup.layer_bytes[routed.layer]
        busy_s = self._hits_s(routed)
        plan, self._cpu_work_bytes = self._split(routed, moment, size, busy_s)
        self._cpu_s = self._cpu_seconds(plan, self._cpu_work_bytes, size, 0.0)
        self._turnover.admitted += len(plan.load)
        if plan.cpu:
            missed = [ExpertId(routed.layer, number) for number in plan.cpu]
            older = [each for each in self._missed if each not in missed]
            self._missed = [*older, *missed][-KEPT_CANDIDATES:]
            if self._holds and not self._admits(moment):
                plan = MissPlan(plan.load, plan.cpu, hold=True)
        self._plan = plan
        return plan

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        if moment.prompt and not predictions:
            predictions = self._foresight.everyone(routed.layer + 1, moment.tokens)
        self._foresee(predictions)
        size = self._setup.layer_bytes[routed.layer]
        link_s = self._link_free_s(moment)
        if plan.load:
            ahead_s = link_s - moment.now_s
            link_s = moment.now_s + self.costs.link_s(size, len(plan.load), ahead_s)
        cpu_until_s = moment.now_s + self._cpu_s
        device_s = self._hits_s(routed)
        waited_s = link_s if plan.load or routed.coming else moment.now_s
        end_s = max(cpu_until_s, moment.now_s, waited_s)
        window = self._window(moment, cpu_until_s, end_s, moment.device_free_s + device_s)
        return self._ahead(routed.layer, window, moment, link_s)

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        self._learn()
        missed = len(self._plan.load) + len(self._plan.cpu)
        moved_s = (
            len(self._plan.load) * self._setup.layer_bytes[layer] / self.costs.link_bytes_per_s
        )
        self._averages.add(moment.now_s, self._routed_s, self._cpu_s, moved_s, missed)
        under_way = self._admits(moment)
        if moment.queue.unstarted - {self._admitting}:
            return ()  # there are wishes enough
        wishes = self._ahead(layer, self._after_layer(moment), moment)
        if not wishes and not under_way and self.look_ahead and not moment.prompt:
            wishes += self._admission(moment)
        return wishes

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
        return self._foresight.spares(expert)

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        least = 0.0 if wish.stays else self.settings.least_use
        if wish.use + self._value.saved_beside(wish.expert, victim) <= least:
            return False
        if wish.stays:
            self._value.watch_pair(wish.expert, victim)
        self._turnover.admitted += 1
        return True

    def _learn(self) -> None:
        """Hold against the layer that is done what was guessed, and remember what it missed."""
        routed, self._routed = self._routed, NOTHING_ROUTED
        self._foresight.done(routed)
        if routed.misses and self._learns:
            self._value.watch(routed.layer, routed.misses)

    # Where misses are served.

    def _split(
        self, routed: Routed, moment: Moment, size: int, busy_s: float
    ) -> tuple[MissPlan, float]:
        """Try how many of the coming experts to wait for; the rest and the misses are split.

        Returns the plan and what the CPU's work costs in bytes read.
        """
        layer, tokens = routed.layer, routed.tokens
        costs = self.costs if self.settings.constants else self.costs.without_constants()
        misses, counts = np.array(routed.misses, np.int64), [tokens[e] for e in routed.misses]
        uses, victim_uses, trust = self._worth(layer)
        lasting = trust * (uses[misses] - victim_uses)
        saved_s = self._saved_s(layer) * self.settings.bonus

        def split(ahead_s: float) -> Split:
            rest = (ahead_s, busy_s, lasting, saved_s)
            return split_least_makespan(misses, counts, size, costs, *rest, landing=True)

        if not routed.coming:
            found = split(self._ahead_s((), layer, moment))
            return found.plan, found.cpu_bytes
        left = moment.queue.left_bytes
        coming = sorted(routed.coming, key=lambda each: left.get(ExpertId(layer, each), 0))
        best, best_s = (NO_MISSES, 0.0), float("inf")
        for awaited in range(len(coming), -1, -1):
            ahead_s = self._ahead_s(coming[:awaited], layer, moment)
            found = split(ahead_s)
            given_up = tuple(coming[awaited:])
            plan = found.plan._replace(cpu=(*found.plan.cpu, *given_up))
            work = [costs.cpu_work_bytes(size, tokens[number]) for number in given_up]
            cpu_bytes = sum(work, found.cpu_bytes)
            waits_s = ahead_s if awaited else 0.0
            link_s = costs.link_s(size, len(plan.load), waits_s) if plan.load else waits_s
            cpu_s = self._cpu_seconds(plan, cpu_bytes, size, waits_s)
            landing_s = [costs.device_s(size, tokens[e]) for e in (*coming[:awaited], *plan.load)]
            last_s = landing_s[-1] if landing_s else 0.0
            total_s = max(link_s + last_s, max(cpu_s, busy_s) + sum(landing_s))
            if total_s < best_s:
                best, best_s = (plan, cpu_bytes), total_s
        return best

    def _cpu_seconds(self, plan: MissPlan, work_bytes: float, size: int, ahead_s: float) -> float:
        """Return how long the CPU's part of a plan takes while the link moves the rest."""
        if not plan.cpu:
            return 0.0
        costs = self.costs
        link_s = costs.link_s(size, len(plan.load), ahead_s) if plan.load else ahead_s
        slow = costs.cpu_bytes_per_s_while_copying
        shared_bytes = min(work_bytes, link_s * slow)
        cpu_s = costs.cpu_call_s + shared_bytes / slow
        return cpu_s + (work_bytes - shared_bytes) / costs.cpu_bytes_per_s

    def _hits_s(self, routed: Routed) -> float:
        """Seconds that the device computes what is in place."""
        tokens = sum(map(routed.tokens.__getitem__, routed.hits))
        size, costs = self._setup.layer_bytes[routed.layer], self.costs
        more_tokens = (tokens - len(routed.hits)) / costs.device_tokens_per_pass
        return size / costs.device_bytes_per_s * (len(routed.hits) + more_tokens)

    def _plan_with(self, costs: Costs) -> None:
        """Go by what the rails cost, as far as serving has shown."""
        self.costs, self._slower = costs, costs.slower_beside_copies
        # Whether copies ahead wait while the CPU computes: they cost it more than they bring.
        brings = min(1.0, costs.link_bytes_per_s / costs.cpu_bytes_per_s)
        self._holds = brings < self.settings.hold_margin * self._slower

    def _compare_with_victim(self, routed: Routed, moment: Moment) -> None:
        """Find out who would go for a miss of this layer, and whether that will have been right."""

        def may_go(expert: ExpertId) -> bool:
            return expert.layer != routed.layer and not self.protects(expert)

        victim = None
        if not moment.free_slots:
            victim = self.eviction.victim(may_go, moment.token, routed.layer)
        self._value.replaces(victim)

    # What is copied ahead.

    def _foresee(self, predictions: Sequence[Prediction]) -> None:
        self._foresight.foresee(predictions, min(self.settings.lookahead, self.look_ahead))

    def _ahead(
        self, layer: int, window: Window, moment: Moment, link_s: float | None = None
    ) -> list[Wish]:
        """Choose copies in the order of their deadlines, as long as each is worth its price."""
        wishes: list[Wish] = []
        if not self.look_ahead or not self.settings.prefetch:
            return wishes
        if self._rests:
            self._rests -= 1
            return wishes
        at_s = self._link_free_s(moment) if link_s is None else link_s
        costs, held, price = self.costs, self._holds, self.settings.margin * self._slower
        for target, deadline_s in ((layer + 1, window.next_s), (layer + 2, window.second_s)):
            if at_s >= deadline_s:
                continue
            experts, use = self._foresight.expected(target)
            if not len(experts):
                continue
            copy_s = self._setup.layer_bytes[target] / costs.link_bytes_per_s
            copies = Copies(
                copy_s, self._saved_s(target), self._hopes.kept, price, held, target == layer + 1
            )
            chosen, hopes = np.empty_like(experts), np.empty_like(use)
            guesses = (experts, use, moment.held(target), self._worth(target))
            count, at_s = choose(*guesses, at_s, window, copies, chosen, hopes)
            for place in range(count):
                expert = ExpertId(target, int(experts[chosen[place]]))
                wishes.append(Wish(expert, deadline_s, float(use[chosen[place]])))
                self._hopes.hope(expert, float(hopes[place]))
        if wishes:
            self._fruitless = 0
        else:
            self._fruitless += 1
            self._rests = min(self._most_rests, self._fruitless // 4)
        return wishes

    # What is brought in because it will be used again.

    def _admits(self, moment: Moment) -> bool:
        """Say whether such a copy is under way."""
        expert, queue = self._admitting, moment.queue
        if expert not in queue.left_bytes and expert not in queue.unstarted:
            self._admitting = None
        return self._admitting is not None

    def _admission(self, moment: Moment) -> list[Wish]:
        """Choose who of those that the CPU computed is worth a copy most, if anybody is.

        A free slot is filled at no one's expense. Else only where copies ahead wait for the CPU to
        pause, and so leave most of the link unused: while a copy is under way its slot is empty
        and the CPU slower.
        """
        averages, costs, free_slot = self._averages, self.costs, moment.free_slots > 0
        pays = self.settings.admit and self._holds and self._value.checked
        if not averages.period_s or not (pays or free_slot):
            return []
        here = moment.here
        self._missed = [each for each in self._missed if each.expert not in here(each.layer)]
        if not self._missed:
            return []
        lasting = {each: self._lasting(each) for each in self._missed}
        found = max(lasting, key=lasting.__getitem__)
        copy_s = self._setup.layer_bytes[found.layer] / costs.link_bytes_per_s
        pass_s = averages.period_s * self._setup.layers
        free = max(0.1, 1.0 - averages.link_share)
        uses = lasting[found] - self._value.lost(copy_s / free / pass_s)
        price_s = self._slower * copy_s * min(1.0, averages.cpu_s / averages.period_s)
        if not free_slot and uses * self._saved_s(found.layer) <= self.settings.margin * price_s:
            return []
        self._admitting = found
        return [Wish(found, moment.now_s + WHENEVER_S, 0.0, stays=True)]

    def _worth(self, layer: int) -> Worth:
        """Return the uses that a slot will save a layer's experts."""
        return self._value.worth(layer)

    def _lasting(self, expert: ExpertId) -> float:
        """Return the uses that a slot will save an expert, beyond those of whom it displaces."""
        worth = self._worth(expert.layer)
        return worth.trust * (float(worth.uses[expert.expert]) - worth.victim_uses)

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
        next_cpu_s, next_link_s = next_s + averages.cpu_s, next_s + averages.demanded_s
        times_s = (moment.now_s, cpu_until_s, next_s, next_cpu_s, next_link_s, second_s)
        return Window(*map(float, times_s))

    def _link_free_s(self, moment: Moment) -> float:
        queue, queued_bytes = moment.queue, moment.queue.backlog_bytes
        if self._admits(moment) and self._admitting is not None:
            size = self._setup.layer_bytes[self._admitting.layer]
            queued_bytes -= queue.left_bytes.get(self._admitting, size)  # others go first
        queued_s = queued_bytes / self.costs.link_bytes_per_s
        return max(moment.now_s, queue.stream_free_s) + queued_s

    def _ahead_s(self, awaited: Sequence[int], layer: int, moment: Moment) -> float:
        """Seconds until the link has moved what is demanded of it already."""
        queue = moment.queue
        rest = sum(queue.left_bytes.get(ExpertId(layer, number), 0) for number in awaited)
        queued_s = (queue.demanded_bytes + rest) / self.costs.link_bytes_per_s
        return max(0.0, queue.stream_free_s - moment.now_s) + queued_s
