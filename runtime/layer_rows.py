"""The rows of one MoE layer: which tokens each expert serves, and their sum in canonical order.

Experts may be computed in any order and place; `combined` adds each token's rows in ascending
expert order, so the result never depends on it. A single token, which is every decode step,
needs no gathering at all and has a form of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from runtime.kernels import ExpertMath, add_in_order, combine


class LayerRows(Protocol):
    """What the executor computes into."""

    @property
    def demands(self) -> Mapping[int, int]:
        """Each routed expert, ascending, and how many tokens it serves."""
        ...

    def compute(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        """Compute the rows of `expert` with its weights, wherever those are."""
        ...

    def compute_together(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Compute the rows of several experts whose weights are on one device.

        The arithmetic is that of `compute`, one by one: even what works number by number rounds
        by position, in the tails of torch's vectorised loops.
        """
        ...

    def combined(self) -> Tensor:
        """Return (tokens, hidden) once every demanded expert is computed."""
        ...


def open_rows(
    math: ExpertMath, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> LayerRows:
    """Read the routing (the one wait of host on device per layer) and prepare its rows.

    `hidden` is (tokens, hidden), `top_k_index` and `top_k_weights` are (tokens, k).
    """
    if hidden.shape[0] == 1:
        return _OneTokenRows(math, hidden, top_k_index, top_k_weights)
    return _ManyTokenRows(math, hidden, top_k_index, top_k_weights)


class _OneTokenRows:
    def __init__(
        self, math: ExpertMath, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> None:
        experts = top_k_index[0].tolist()
        self._math = math
        self._hidden = hidden
        self._weights = dict(zip(experts, top_k_weights[0].view(-1, 1, 1).unbind(), strict=True))
        self._rows: dict[int, Tensor] = {}
        self.demands = dict.fromkeys(sorted(experts), 1)

    def compute(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        hidden, weights = self._hidden, self._weights[expert]
        device = next(iter(parts.values())).device
        if device == hidden.device:
            self._rows[expert] = self._math.rows(parts, hidden, weights)
        else:
            rows = self._math.rows(parts, hidden.to(device), weights.to(device))
            self._rows[expert] = rows.to(hidden.device, non_blocking=True)

    def compute_together(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        device = next(iter(next(iter(experts.values())).values())).device
        if device == self._hidden.device:
            for expert, parts in experts.items():
                self.compute(expert, parts)
            return
        # One copy there and one back for all: each costs as much as a small expert's arithmetic.
        hidden = self._hidden.to(device)
        weights = torch.cat([self._weights[expert] for expert in experts]).to(device)
        rows = [
            self._math.rows(parts, hidden, weight.unsqueeze(0))
            for parts, weight in zip(experts.values(), weights.unbind(), strict=True)
        ]
        home = torch.cat(rows).to(self._hidden.device, non_blocking=True)
        self._rows.update(zip(experts, home.unsqueeze(1).unbind(), strict=True))

    def combined(self) -> Tensor:
        rows = torch.stack([self._rows[expert] for expert in self.demands], dim=1)
        return add_in_order(rows, self._hidden.dtype)


class _ManyTokenRows:
    """Sorted once by expert; within one expert by (k, token), as `eager` gathers them."""

    def __init__(
        self, math: ExpertMath, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> None:
        tokens, k = top_k_index.shape
        by_k = top_k_index.T.reshape(-1)
        chosen, order = torch.sort(by_k, stable=True)
        self._math = math
        self._hidden = hidden
        self._top_k_index = top_k_index
        self._token_of = order % tokens
        self._row_of = self._token_of * k + order // tokens
        self._weights = top_k_weights.reshape(-1, 1)[self._row_of]
        row_dtype = math.row_dtype(hidden.dtype, top_k_weights.dtype)
        self._rows = hidden.new_empty((tokens * k, hidden.shape[1]), dtype=row_dtype)
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        self.demands = dict(zip(experts.tolist(), counts.tolist(), strict=True))
        self._begin: dict[int, int] = {}
        begin = 0
        for expert, count in self.demands.items():
            self._begin[expert] = begin
            begin += count

    def compute(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        begin = self._begin[expert]
        mine = slice(begin, begin + self.demands[expert])
        device = next(iter(parts.values())).device
        x = self._hidden[self._token_of[mine]].to(device)
        rows = self._math.rows(parts, x, self._weights[mine].to(device))
        self._rows[self._row_of[mine]] = rows.to(self._rows.device)

    def compute_together(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        for expert, parts in experts.items():
            self.compute(expert, parts)

    def combined(self) -> Tensor:
        return combine(self._rows, self._top_k_index, self._hidden.dtype)


LAST_TOKENS = 64
HALF_LIFE_TOKENS = 16


def recency_of(top_k_indices: Sequence[Tensor]) -> dict[int, float]:
    """Weigh the experts of the last tokens of prompts: 0.5 ** (tokens ago / 16), summed.

    Each index is (tokens, k), of one sequence. Experts of earlier tokens have no entry.
    """
    weight: dict[int, float] = {}
    for index in top_k_indices:
        for ago, experts in enumerate(reversed(index[-LAST_TOKENS:].tolist())):
            for expert in experts:
                weight[expert] = weight.get(expert, 0.0) + 0.5 ** (ago / HALF_LIFE_TOKENS)
    return weight
