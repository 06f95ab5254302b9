"""Learning from live tokens, whose routing labels every guess for free: never in the hot loop.

A correction is a bias and a low-rank change of the router's matrix, learned in idle time on the
tokens last seen and used only after it has guessed better on tokens that came later. It folds into
the matrix that is multiplied anyway, so it costs nothing at inference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.predictor_ranking import Curve, margins

RANK = 8
STEPS = 40
RATE = 0.02
_MIN_ROWS = 64
_MIN_TRIAL_TOKENS, _MAX_TRIAL_TOKENS = 64, 1024
_SURE_ERRORS = 2.5
_MIN_GAIN = 0.005
_ROUNDS_OF_NEWTON = 8


@dataclass(frozen=True)
class Correction:
    """What is added to scores: `bias` (experts,) plus x @ (up @ down).T, with `up` (experts, rank)
    and `down` (rank, hidden), both None where only the bias is learned. All in float32."""

    bias: Tensor
    up: Tensor | None = None
    down: Tensor | None = None

    def added(self, x: Tensor) -> Tensor:
        """Return what this adds to the logits of rows `x` (rows, hidden)."""
        out = self.bias.expand(x.shape[0], -1)
        if self.up is not None and self.down is not None:
            out = out + (x @ self.down.T) @ self.up.T
        return out


Scored = Callable[[Tensor], Tensor]
"""Turns logits (rows, experts) into what experts are ranked by."""


def recalled(scores: Tensor, chosen: Tensor, count: int) -> Tensor:
    """Return (rows,): the share of `chosen` (rows, k) among the `count` best of `scores`."""
    best = torch.zeros_like(scores)
    best.scatter_(1, scores.topk(min(count, scores.shape[1]), dim=1).indices, 1.0)
    return best.gather(1, chosen).mean(dim=1)


def learn(
    logits: Tensor,
    x: Tensor,
    chosen: Tensor,
    start: Correction | None,
    scored: Scored,
    slope: float,
    low_rank: bool,
) -> Correction | None:
    """Return a correction that fits these rows better than `start`; None if they are too few.

    Args:
        logits: (rows, experts) without any correction, in float32.
        x: (rows, hidden), what they were computed from.
        chosen: (rows, k), the experts that were routed.
        start: the correction in use.
        scored: how logits become scores.
        slope: that of the scores' probability curve; their unit.
        low_rank: learn a change of the matrix too, not only a bias.
    """
    rows, experts = logits.shape
    if rows < _MIN_ROWS:
        return None
    with torch.inference_mode(mode=False), torch.enable_grad():
        # Copies, since tensors made in inference mode cannot take part in learning.
        logits, x, chosen = logits.float().clone(), x.float().clone(), chosen.clone()
        wanted = torch.zeros_like(logits).scatter_(1, chosen, 1.0 / chosen.shape[1])
        now = start or Correction(torch.zeros(experts, device=logits.device))
        bias = now.bias.clone().requires_grad_()
        weights = [bias]
        up, down = now.up, now.down
        if low_rank:
            if up is None or down is None:
                directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:RANK]
                up, down = torch.zeros(experts, len(directions), device=x.device), directions
            up = up.clone().requires_grad_()
            weights.append(up)
        optimizer = torch.optim.Adam(weights, lr=max(float(logits.std()), 1e-6) * RATE)
        for _ in range(STEPS):
            tried = Correction(bias, up, down)
            scores = scored(logits + tried.added(x))
            loss = -(torch.log_softmax(scores * slope, dim=1) * wanted).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Correction(bias.detach(), None if up is None else up.detach(), down)


@dataclass
class Trial:
    """A correction on probation: how much more it would have recalled than what is in use.

    Only tokens it has not learned from count, those of later answers: tokens of one answer are
    alike, and what fits them may not fit the next.
    """

    correction: Correction
    tokens: int = 0
    gain: float = 0.0
    gain_squared: float = 0.0

    def add(self, after: Tensor, before: Tensor) -> None:
        """Take in both recalls (rows,) on tokens not seen before."""
        gain = (after - before).double()
        self.tokens += len(gain)
        self.gain += float(gain.sum())
        self.gain_squared += float(gain.square().sum())

    @property
    def verdict(self) -> bool | None:
        """True if it surely is better, False if it surely is not or took too long, else None."""
        if self.tokens < _MIN_TRIAL_TOKENS:
            return None
        mean = self.gain / self.tokens
        error = (max(0.0, self.gain_squared / self.tokens - mean * mean) / self.tokens) ** 0.5
        if mean > max(_SURE_ERRORS * error, _MIN_GAIN):
            return True
        return False if mean <= 0.0 or self.tokens >= _MAX_TRIAL_TOKENS else None


def fit_curve(scores: Tensor, chosen: Tensor, start: Curve) -> Curve:
    """Return the logistic curve that fits best which experts were routed, by Newton's method."""
    k = chosen.shape[1]
    margin = margins(scores.float(), k)
    wanted = torch.zeros_like(margin).scatter_(1, chosen, 1.0)
    unit = max(float(margin.std()), 1e-9)
    m, y = (margin / unit).flatten().double().cpu(), wanted.flatten().double().cpu()
    design = torch.stack((m, torch.ones_like(m)), dim=1)
    theta = torch.tensor([start.slope * unit, start.offset], dtype=torch.double)
    for _ in range(_ROUNDS_OF_NEWTON):
        p = torch.sigmoid(design @ theta)
        # A little ridge keeps the curve finite where every guess was right.
        gradient = design.T @ (p - y) + 1e-2 * theta
        curvature = (design.T * (p * (1 - p))) @ design + 1e-2 * torch.eye(2, dtype=torch.double)
        move = torch.linalg.solve(curvature, gradient)
        theta = theta - move.clamp(-2.0, 2.0)
    slope, offset = theta.tolist()
    return Curve(slope / unit, offset) if slope > 0 else start
