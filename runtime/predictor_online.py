"""Learning from live tokens, whose routing labels every guess for free: never in the hot loop.

A correction is a bias and a low-rank change of the router's matrix, learned in idle time on the
tokens last seen and kept only if it guesses better on the newest of them, which it did not learn
from. It folds into the matrix that is multiplied anyway, so it costs nothing at inference.
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
_CHECKED_SHARE = 0.25
_MIN_ROWS = 64
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
    """Return a correction that guesses better than `start` on the newest rows, or None.

    Args:
        logits: (rows, experts) without any correction, oldest row first, in float32.
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
    learned, k = rows - int(rows * _CHECKED_SHARE), chosen.shape[1]
    with torch.inference_mode(mode=False), torch.enable_grad():
        # Copies, since tensors made in inference mode cannot take part in learning.
        logits, x, chosen = logits.float().clone(), x.float().clone(), chosen.clone()
        wanted = torch.zeros_like(logits).scatter_(1, chosen, 1.0 / k)
        now = start or Correction(torch.zeros(experts, device=logits.device))
        bias = now.bias.clone().requires_grad_()
        weights = [bias]
        up, down = now.up, now.down
        if low_rank:
            if up is None or down is None:
                spread = x[:learned] - x[:learned].mean(0)
                directions = torch.linalg.svd(spread, full_matrices=False)[2][:RANK]
                up, down = torch.zeros(experts, len(directions), device=x.device), directions
            up = up.clone().requires_grad_()
            weights.append(up)
        step = max(float(logits.std()), 1e-6) * RATE
        optimizer = torch.optim.Adam(weights, lr=step)
        for _ in range(STEPS):
            tried = Correction(bias, up, down)
            scores = scored(logits[:learned] + tried.added(x[:learned]))
            loss = -(torch.log_softmax(scores * slope, dim=1) * wanted[:learned]).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    with torch.no_grad():
        made = Correction(bias.detach(), None if up is None else up.detach(), down)
        before = recalled(scored(logits[learned:] + now.added(x[learned:])), chosen[learned:], k)
        after = recalled(scored(logits[learned:] + made.added(x[learned:])), chosen[learned:], k)
        return made if surely_better(after, before) else None


def surely_better(after: Tensor, before: Tensor, margin: float = 0.0) -> bool:
    """Say whether rows got better by more than `margin` plus a standard error of the mean."""
    gain = after - before - margin
    error = float(gain.std()) / len(gain) ** 0.5 if len(gain) > 1 else float("inf")
    return float(gain.mean()) > error


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
