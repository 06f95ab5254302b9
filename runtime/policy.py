"""What a policy decides, and what it is told: the seam between residency and every rule.

Residency keeps the books (who is where, who waits for what); a policy only chooses: which misses
go over the link, what is copied ahead, who is evicted. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from runtime.cache import Flags
from runtime.core import ExpertId, PolicyName
from runtime.eviction import Eviction, Experts
from runtime.scheduler import Costs, MissPlan
from runtime.trace import Prediction
from runtime.transfer_queue import QueueState


@dataclass(frozen=True)
class PolicySetup:
    """What a policy is made for. `layer_bytes[l]` is the size of an expert of MoE layer l."""

    experts: tuple[int, ...]
    top_k: int
    layer_bytes: tuple[int, ...]
    slots: int
    costs: Costs

    @property
    def layers(self) -> int:
        return len(self.experts)


class Moment(NamedTuple):
    """The state of the machine when a policy is asked.

    `token` counts tokens since the start; `tokens` is how many rows the pass has, and `prompt`
    whether they follow one another in a prompt. `now_s` is the host's time, `device_free_s` when
    the device will have computed all it was given. `here` names the experts of a layer that have a
    slot, `held` flags them by number. `in_ram` says whether one can be copied or computed on the
    CPU without being read from disk first.
    """

    token: float
    tokens: int
    prompt: bool
    now_s: float
    device_free_s: float
    queue: QueueState
    free_slots: int
    here: Callable[[int], Container[int]]
    held: Callable[[int], Flags]
    in_ram: Callable[[ExpertId], bool] = lambda expert: True

    def holds(self, expert: ExpertId) -> bool:
        """Say whether an expert has a slot."""
        return expert.expert in self.here(expert.layer)


class Routed(NamedTuple):
    """A layer that was just routed: what is in place, what is coming and what is missing.

    `coming` are on the link; `misses` have no slot, or one whose copy has not begun. `tokens` says
    for each expert how many it has, and `chosen` are all of them.
    """

    layer: int
    tokens: Mapping[int, int]
    chosen: Experts
    hits: Sequence[int]
    coming: Sequence[int]
    misses: Sequence[int]


class Wish(NamedTuple):
    """Copy `expert` ahead: the link takes wishes by `deadline_s`. `use` is how likely it is
    needed then, 0 to 1. One that `stays` is wanted for good, not on probation until it is used."""

    expert: ExpertId
    deadline_s: float
    use: float
    stays: bool = False


class Policy(Protocol):
    """One way to place experts. Called by residency only, on the engine thread."""

    name: PolicyName
    eviction: Eviction
    predicts: bool
    """Whether it goes by the predictor's guesses."""
    copies_ahead: bool
    """Whether it copies experts ahead of their layers at all."""
    look_ahead: int
    """For how many layers it does so now, 0 to 2; a person or the controller decides that."""

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        """A forward pass begins; return what to copy before its first layer is routed."""
        ...

    def place(self, routed: Routed, moment: Moment) -> MissPlan:
        """Say where each miss of a layer is served.

        A coming expert that is named for the CPU is computed there; its copy goes on.
        """
        ...

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        """Return what to copy while this layer is served."""
        ...

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        """Return what to copy from the end of this layer on."""
        ...

    def note_link(self, moved_bytes: int, busy_s: float) -> None:
        """Hear what the link has moved since the start, and how long it was busy with it."""
        ...

    def note_cpu(self, seconds: float) -> None:
        """Hear how long the CPU took for the experts of the plan."""
        ...

    def protects(self, expert: ExpertId) -> bool:
        """Say whether a resident expert should be kept although its eviction rule would not."""
        ...

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        """Say whether a wish is worth more than the expert it would evict."""
        ...


class Reactive:
    """What policies without foresight share: nothing is copied ahead, nobody is protected."""

    predicts = False
    copies_ahead = False
    look_ahead = 0

    def begin_pass(self, predictions: Sequence[Prediction], moment: Moment) -> Sequence[Wish]:
        return ()

    def beside(
        self, routed: Routed, plan: MissPlan, predictions: Sequence[Prediction], moment: Moment
    ) -> Sequence[Wish]:
        return ()

    def between(self, layer: int, moment: Moment) -> Sequence[Wish]:
        return ()

    def note_link(self, moved_bytes: int, busy_s: float) -> None:
        """Nothing to learn."""

    def note_cpu(self, seconds: float) -> None:
        """Nothing to learn."""

    def protects(self, expert: ExpertId) -> bool:
        return False

    def displaces(self, wish: Wish, victim: ExpertId, moment: Moment) -> bool:
        return False
