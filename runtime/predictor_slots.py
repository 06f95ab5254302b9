"""One slot per (layer, distance): both ways of guessing it, what was learned, and which is in use.

Places are counted from 0, before the first layer; layer l is place l + 1. The slot (t, d) is
guessed at place t + 1 - d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.predictor_heads import Heads
from runtime.predictor_online import Correction, Trial
from runtime.predictor_ranking import Curve
from runtime.predictor_reuse import DISTANCES, RouterView, folded, folded_from_residual
from runtime.predictor_shadow import Running, Shadow

_SLOPE_PER_SPREAD = 2.5


@dataclass
class Slot:
    """How layer `layer` is guessed `distance` layers before it.

    Where `reusable`, its router `view` is asked on what the router `source` sees (None: on the
    token's embedding). `correction` is learned on top of that, `head_bias` (experts,) on top of
    the learned head; `trial` is what may replace the one in use. The curves turn each one's scores
    into probabilities; `first_curve` is the reused router's before anything was measured.
    """

    layer: int
    distance: int
    experts: int
    top_k: int
    view: RouterView | None
    source: RouterView | None
    reusable: bool
    reuse_curve: Curve = Curve(1.0, 0.0)
    learned_curve: Curve = Curve(1.0, 0.0)
    first_curve: Curve = Curve(1.0, 0.0)
    correction: Correction | None = None
    head_bias: Tensor | None = None
    trial: Trial | None = None
    shadow: Shadow = field(default_factory=lambda: Shadow(Running(), Running()))

    @property
    def place(self) -> int:
        return self.layer + 1 - self.distance

    @property
    def curve(self) -> Curve:
        """The curve of the prediction in use."""
        return self.learned_curve if self.shadow.learned_on else self.reuse_curve

    @property
    def plain(self) -> bool:
        """Whether the prediction in use ranks by its scores as they are."""
        if self.shadow.learned_on or self.view is None:
            return True
        return self.view.scoring == "logits" and self.view.selection_bias is None

    @property
    def usable(self) -> bool:
        """Whether there is anything to guess with just now."""
        return self.reusable or self.shadow.learned_on

    def folded(self) -> Tensor:
        """Return (experts, hidden) in float32: the router folded for where it is asked."""
        assert self.view is not None
        if self.source is None:
            return folded_from_residual(self.view)
        return folded(self.source, self.view)

    def matrix(self) -> Tensor:
        """Return `folded` with what was learned."""
        correction = self.correction
        if correction is None or correction.up is None or correction.down is None:
            return self.folded()
        return self.folded() + correction.up @ correction.down

    def own_bias(self) -> Tensor:
        """Return (experts,): the router's own bias, zeros if it has none."""
        assert self.view is not None
        bias = torch.zeros(self.experts, device=self.view.weight.device)
        return bias if self.view.bias is None else bias + self.view.bias.detach().float()

    def bias(self) -> Tensor:
        """Return `own_bias` with what was learned."""
        return self.own_bias() + (0.0 if self.correction is None else self.correction.bias)

    def decide(self, has_learned: bool) -> None:
        """Use whichever did better in the shadow."""
        self.shadow.decide(self.reusable, has_learned)

    def forget(self) -> None:
        """Drop what was learned here, and all evidence."""
        self.reuse_curve, self.learned_curve = self.first_curve, Curve(1.0, 0.0)
        self.correction = self.head_bias = self.trial = None
        self.shadow = Shadow(Running(), Running())


def make_slots(
    views: Sequence[RouterView | None], has_embedding: bool, heads: Heads | None
) -> tuple[Slot, ...]:
    """Return a slot for every (layer, distance) that can be guessed at all, place by place."""
    slots = []
    for place in range(len(views)):
        source = views[place - 1] if place else None
        for distance in DISTANCES:
            layer = place + distance - 1
            view = views[layer] if layer < len(views) else None
            asked = has_embedding if place == 0 else source is not None
            reusable = view is not None and asked
            owner = view or heads
            if layer >= len(views) or owner is None or not (reusable or heads is not None):
                continue
            slot = Slot(layer, distance, owner.experts, owner.top_k, view, source, reusable)
            if reusable:
                slot.reuse_curve = slot.first_curve = _first_curve(slot)
            slots.append(slot)
    return tuple(slots)


def _first_curve(slot: Slot) -> Curve:
    """A curve for scores nobody has measured yet: their spread on random inputs is the unit."""
    assert slot.view is not None
    matrix = slot.folded()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, matrix.shape[1], generator=generator).to(matrix.device)
    spread = float(slot.view.scored(x @ matrix.T).float().std())
    return Curve(_SLOPE_PER_SPREAD / max(spread, 1e-9), 0.0)
