"""The rows of one MoE layer: which tokens each expert serves, and their sum in canonical order.

Experts may be computed in any order and place; `combined` adds each token's rows in ascending
expert order, so the result never depends on it. A single token, which is every decode step,
needs no gathering at all and has a form of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from runtime.device import Crossing
from runtime.kernels import ExpertMath, add_in_order, combine

LAST_TOKENS = 64
HALF_LIFE_TOKENS = 16


@dataclass(frozen=True)
class RoutedTokens:
    """What one sequence brings to a MoE layer: hidden states (tokens, hidden), the experts its
    router chose (tokens, k) and their weights (tokens, k)."""

    hidden_states: Tensor
    top_k_index: Tensor
    top_k_weights: Tensor


class LayerRows(Protocol):
    """What the executor computes into."""

    @property
    def demands(self) -> Mapping[int, int]:
        """Each routed expert, ascending, and how many tokens it serves."""
        ...

    @property
    def last_chosen(self) -> Tensor:
        """The experts of the last tokens (up to `LAST_TOKENS`, k), in host memory."""
        ...

    def compute(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        """Compute the rows of `expert` on the device, where its weights are."""
        ...

    def compute_on_cpu(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Compute the rows of several experts whose weights are in host memory.

        The arithmetic is that of `compute`, one by one: even what works number by number rounds
        by position, in the tails of torch's vectorised loops.
        """
        ...

    def combined(self) -> Tensor:
        """Return (tokens, hidden) once every demanded expert is computed."""
        ...


def open_rows(
    math: ExpertMath,
    crossing: Crossing,
    parts: Sequence[RoutedTokens],
    also: Sequence[Tensor] = (),
    cpu_likely: bool = False,
) -> tuple[list[LayerRows], Sequence[Tensor]]:
    """Prepare the rows of every part, and read their routing and `also` to the host.

    That is the one wait of host on device per layer, for all parts together. If it is likely that
    the CPU computes experts, what it needs of single tokens comes along; else it is read when it is
    needed, beside what was launched by then.
    """
    opened = [
        _OneTokenRows(math, crossing, part, cpu_likely)
        if part.hidden_states.shape[0] == 1
        else _ManyTokenRows(math, crossing, part)
        for part in parts
    ]
    asked = [tensor for mine in opened for tensor in mine.asked]
    found = crossing.to_host([*asked, *also])
    begin = 0
    for mine in opened:
        end = begin + len(mine.asked)
        mine.routed(found[begin:end])
        begin = end
    return [*opened], found[begin:]


class _OneTokenRows:
    def __init__(
        self, math: ExpertMath, crossing: Crossing, part: RoutedTokens, cpu_likely: bool
    ) -> None:
        self._math = math
        self._crossing = crossing
        self._hidden = part.hidden_states
        self._top_k_weights = part.top_k_weights
        self._for_cpu = (part.hidden_states, part.top_k_weights)
        self.asked = (part.top_k_index, *(self._for_cpu if cpu_likely else ()))
        self._on_cpu: Sequence[Tensor] = ()
        self._rows: dict[int, Tensor] = {}
        self._weights: dict[int, Tensor] | None = None
        self._weights_on_cpu: dict[int, Tensor] | None = None
        self.demands: Mapping[int, int] = {}

    def routed(self, on_cpu: Sequence[Tensor]) -> None:
        self.last_chosen, *self._on_cpu = on_cpu
        self._experts = self.last_chosen[0].tolist()
        self.demands = dict.fromkeys(sorted(self._experts), 1)

    def compute(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        if self._weights is None:
            self._weights = self._by_expert(self._top_k_weights)
        self._rows[expert] = self._math.rows(parts, self._hidden, self._weights[expert])

    def compute_on_cpu(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        if not self._on_cpu:
            self._on_cpu = self._crossing.to_host_beside(self._for_cpu)
        hidden, top_k_weights = self._on_cpu
        if self._weights_on_cpu is None:
            self._weights_on_cpu = self._by_expert(top_k_weights)
        rows = [
            self._math.rows(parts, hidden, self._weights_on_cpu[expert])
            for expert, parts in experts.items()
        ]
        self._rows.update(zip(experts, self._crossing.to_device(rows), strict=True))

    def combined(self) -> Tensor:
        rows = torch.stack([self._rows[expert] for expert in self.demands], dim=1)
        return add_in_order(rows, self._hidden.dtype)

    def _by_expert(self, top_k_weights: Tensor) -> dict[int, Tensor]:
        return dict(zip(self._experts, top_k_weights[0].view(-1, 1, 1).unbind(), strict=True))


class _ManyTokenRows:
    """Sorted once by expert; within one expert by (k, token), as `eager` gathers them."""

    def __init__(self, math: ExpertMath, crossing: Crossing, part: RoutedTokens) -> None:
        hidden, top_k_weights = part.hidden_states, part.top_k_weights
        tokens, k = part.top_k_index.shape
        by_k = part.top_k_index.T.reshape(-1)
        chosen, order = torch.sort(by_k, stable=True)
        self._math = math
        self._crossing = crossing
        self._hidden = hidden
        self._top_k_index = part.top_k_index
        self._token_of = order % tokens
        self._row_of = self._token_of * k + order // tokens
        self._weights = top_k_weights.reshape(-1, 1)[self._row_of]
        row_dtype = math.row_dtype(hidden.dtype, top_k_weights.dtype)
        self._rows = hidden.new_empty((tokens * k, hidden.shape[1]), dtype=row_dtype)
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        self.asked = (experts, counts, part.top_k_index[-LAST_TOKENS:])
        self._on_cpu: Sequence[Tensor] | None = None
        self.demands: Mapping[int, int] = {}
        self._begin: dict[int, int] = {}

    def routed(self, on_cpu: Sequence[Tensor]) -> None:
        experts, counts, self.last_chosen = on_cpu
        self.demands = dict(zip(experts.tolist(), counts.tolist(), strict=True))
        begin = 0
        for expert, count in self.demands.items():
            self._begin[expert] = begin
            begin += count

    def compute(self, expert: int, parts: Mapping[str, Tensor]) -> None:
        mine = self._slice(expert)
        x = self._hidden[self._token_of[mine]]
        self._rows[self._row_of[mine]] = self._math.rows(parts, x, self._weights[mine])

    def compute_on_cpu(self, experts: Mapping[int, Mapping[str, Tensor]]) -> None:
        if self._on_cpu is None:
            # Only now: a prompt's hidden states are large, and most layers need them on the device.
            needed = (self._hidden, self._token_of, self._weights)
            self._on_cpu = self._crossing.to_host_beside(needed)
        hidden, token_of, weights = self._on_cpu
        rows = []
        for expert, parts in experts.items():
            mine = self._slice(expert)
            rows.append(self._math.rows(parts, hidden[token_of[mine]], weights[mine]))
        for expert, home in zip(experts, self._crossing.to_device(rows), strict=True):
            self._rows[self._row_of[self._slice(expert)]] = home

    def combined(self) -> Tensor:
        return combine(self._rows, self._top_k_index, self._hidden.dtype)

    def _slice(self, expert: int) -> slice:
        begin = self._begin[expert]
        return slice(begin, begin + self.demands[expert])


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
