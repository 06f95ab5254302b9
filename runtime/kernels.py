"""The arithmetic of one expert and the one canonical way its rows are added up.

Bit for bit what transformers' `eager` experts compute, on any device. An expert reads typed views
into a slot or slab; every (token, k) has a row of its own, and `combine` alone adds rows, so that
the order in which experts became available never reaches the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.formats import ExpertFormat, Matrix
from runtime.kernels_quantised import FEW_TOKENS, multiply

Accumulate = Literal["hidden", "weights", "float32"]


@dataclass(frozen=True)
class ExpertMath:
    """How one MoE layer computes an expert; built once per layer, shared by all its experts.

    `up` and `down` name the parts; `up_bias` and `down_bias` are None where the family has none.
    `activate` maps (t, up width) to (t, inner width). `normalize`, where a family has it, is
    applied to the expert's output. `accumulate` says in which dtype rows are added: that of the
    hidden states, that of the routing weights, or float32. `matrices` are those that are held
    quantised; `reading` sets them. Thread-safe: nothing is kept.
    """

    up: str
    down: str
    up_bias: str | None
    down_bias: str | None
    transposed: bool
    activate: Callable[[Tensor], Tensor]
    normalize: Callable[[Tensor], Tensor] | None = None
    in_float32: bool = False
    accumulate: Accumulate = "hidden"
    matrices: tuple[Matrix, ...] = ()
    few_tokens: int | None = FEW_TOKENS

    def reading(self, layout: ExpertFormat, few_tokens: int | None = FEW_TOKENS) -> ExpertMath:
        """Return the same arithmetic over weights that are held as `layout` says.

        Up to `few_tokens` a CPU multiplies by them as they are held, above it dequantises first;
        None stands for the reference, as if the weights were plain.
        """
        return replace(self, matrices=layout.matrices, few_tokens=few_tokens)

    def row_dtype(self, hidden: torch.dtype, weights: torch.dtype) -> torch.dtype:
        """Return the dtype of `rows` for hidden states and routing weights of these dtypes."""
        if self.accumulate == "hidden":
            return hidden
        return weights if self.accumulate == "weights" else torch.float32

    def rows(self, parts: Mapping[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
        """Return (t, hidden): the expert's output for `x` (t, hidden) times `weights` (t, 1).

        `parts` are the views that `views` made. Equality with `eager` to the last bit on several
        rows needs them by k and then by token, as `eager` gathers them: a matrix product may
        round by position.
        """
        if self.in_float32:
            return self._rows_in_float32(parts, x, weights)
        inner = self._multiply(parts, self.up, x)
        if self.up_bias is not None:
            inner = inner + parts[self.up_bias]
        inner = self.activate(inner)
        out = self._multiply(parts, self.down, inner)
        if self.down_bias is not None:
            out = out + parts[self.down_bias]
        if self.normalize is not None:
            out = self.normalize(out)
        weighted = out * weights
        return weighted.to(self.row_dtype(x.dtype, weights.dtype))

    def _rows_in_float32(self, parts: Mapping[str, Tensor], x: Tensor, weights: Tensor) -> Tensor:
        inner = self._multiply(parts, self.up, x.float())
        if self.up_bias is not None:
            inner = inner + parts[self.up_bias].float()
        inner = self.activate(inner).float()
        out = self._multiply(parts, self.down, inner)
        if self.down_bias is not None:
            out = out + parts[self.down_bias].float()
        return out * weights.float()

    def _multiply(self, parts: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        for matrix in self.matrices:
            if matrix.name == name:
                return multiply(matrix, parts, x, self.few_tokens)
        weight = parts[name].to(x.dtype)
        return x @ weight if self.transposed else linear(x, weight)


def combine(rows: Tensor, top_k_index: Tensor, dtype: torch.dtype) -> Tensor:
    """Add each token's rows in ascending expert order and return (T, hidden) in `dtype`.

    `rows` is (T * k, hidden), row `t * k + j` belonging to `top_k_index[t, j]`.
    """
    tokens, k = top_k_index.shape
    order = top_k_index.argsort(dim=1)
    if tokens > 1:
        order = order + torch.arange(0, tokens * k, k, device=order.device).unsqueeze(1)
    return add_in_order(rows.index_select(0, order.view(-1)).view(tokens, k, -1), dtype)


def add_in_order(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Add up `rows` (T, k, hidden), already in ascending expert order, from zero, one by one."""
    # Zero plus a row is that row, except that a negative zero becomes a positive one.
    first, *others = rows.unbind(1)
    total = first + 0
    for row in others:
        total += row
    return total.to(dtype)


def views(flat: Tensor, layout: ExpertFormat) -> dict[str, Tensor]:
    """Return the typed parts of one expert inside `flat`, uint8 of at least `size_bytes`.

    The views share memory with `flat`, which must start at a 64-byte boundary.
    """
    parts = {}
    for part in layout.parts:
        raw = flat[part.offset_bytes : part.offset_bytes + part.size_bytes]
        parts[part.name] = raw.view(getattr(torch, part.dtype)).view(part.shape)
    return parts
