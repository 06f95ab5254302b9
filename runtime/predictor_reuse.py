"""Router reuse: the router of a later layer applied to this layer's state, without any training.

A root-mean-square norm only rescales, so what layer l's router sees, divided by the gain of layer
l's norm, is the renormalised residual; times layer t's gain it is what layer t's router would see
if nothing were added in between. Both gains fold into the router's matrix, so that the guesses for
all targets of a layer are one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Scoring = Literal["logits", "softmax", "sigmoid", "sqrtsoftplus"]
SCORINGS: tuple[Scoring, ...] = ("logits", "sigmoid", "softmax", "sqrtsoftplus")
DISTANCES = (1, 2)

# A gain this much smaller than the largest one is taken for zero: nothing can be divided by it.
_ZERO_GAIN = 1e-6


@dataclass(frozen=True)
class RouterView:
    """What one layer's router does, in figures that were checked against the router itself.

    It sees `gain` (hidden,) times the residual at unit root mean square, and ranks experts by
    `scored(x @ weight.T + bias)`; `weight` is (experts, hidden), `bias` and `selection_bias` are
    (experts,) or None. All tensors lie on the model's device and may be its own parameters.
    """

    top_k: int
    weight: Tensor
    bias: Tensor | None
    gain: Tensor
    scoring: Scoring = "logits"
    selection_bias: Tensor | None = None

    @property
    def experts(self) -> int:
        return self.weight.shape[0]

    def scored(self, logits: Tensor) -> Tensor:
        """Turn logits (..., experts) into what the router ranks experts by."""
        return scored(logits, self.scoring, self.selection_bias)


def scored(logits: Tensor, scoring: Scoring, selection_bias: Tensor | None) -> Tensor:
    """Turn logits (..., experts) into the scores that experts are ranked by."""
    if scoring == "sigmoid":
        logits = logits.float().sigmoid()
    elif scoring == "softmax":
        logits = logits.float().softmax(-1)
    elif scoring == "sqrtsoftplus":
        logits = torch.nn.functional.softplus(logits.float()).sqrt()
    return logits if selection_bias is None else logits + selection_bias


def folded(source: RouterView, target: RouterView) -> Tensor:
    """Return (target experts, hidden) in float32: maps `source`'s router input to target logits.

    Where the source's gain is zero its input says nothing about the residual, so nothing is taken
    from there.
    """
    from_gain = source.gain.float()
    usable = from_gain.abs() > _ZERO_GAIN * from_gain.abs().max()
    ratio = torch.where(usable, target.gain.float() / torch.where(usable, from_gain, 1.0), 0.0)
    return target.weight.detach().float() * ratio


def folded_from_residual(target: RouterView) -> Tensor:
    """Return (target experts, hidden) in float32: maps a residual at unit RMS to target logits."""
    return target.weight.detach().float() * target.gain.float()


def unit_rms(residual: Tensor) -> Tensor:
    """Rescale rows (tokens, hidden) to a root mean square of one."""
    return torch.nn.functional.rms_norm(residual, residual.shape[-1:], eps=1e-12)


def targets_of(
    layer: int, views: Sequence[RouterView | None]
) -> tuple[tuple[int, int, RouterView], ...]:
    """Return (distance, layer, view) of what can be guessed from `layer`; -1 is the tokens."""
    found = []
    for distance in DISTANCES:
        target = layer + distance
        if target < len(views) and (view := views[target]) is not None:
            found.append((distance, target, view))
    return tuple(found)
