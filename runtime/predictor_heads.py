"""LLaPor's learned heads: one small network per MoE layer that scores the next two layers' experts.

A head compresses what the router saw (a projection that starts as its principal components), adds
what the token, the recent choices of the target layers and this layer's choice say, and has one
hidden layer; in the middle of the model also a residual block with a gate. After PreScope's LLaPor
(arXiv 2509.23638). What a token or a choice says is a row of a table, so little is read for it; the
dense parts are int8 with a scale per row and are widened as they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

INT8_MAX = 127
_TABLE_BYTES = 2


@dataclass(frozen=True)
class Packed:
    """A matrix in int8: `values` (rows, columns) times `scales` (rows,) in float32."""

    values: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes as stored, one per value."""
        return self.values.numel() + self.scales.numel() * 4


@dataclass(frozen=True)
class Head:
    """The learned weights of one place; place 0 is before the first layer, l + 1 is at layer l.

    With H hidden, r compressed, w = n + o wide (n inner, o = 2 x experts outputs): `compress` is
    int8 (r, H), its scales are inside `first` (w, r); `second` is (o, n); `routed` (E, w) in half
    precision has a row per expert chosen here, None at place 0. `gate` (n, r) and `inner` (n, n)
    make the residual block, None outside the middle.
    """

    compress: Tensor
    first: Packed
    second: Packed
    routed: Tensor | None
    gate: Packed | None
    inner: Packed | None

    @property
    def dense_bytes(self) -> int:
        """Bytes read at every use, whatever the token."""
        parts = (self.first, self.second, self.gate, self.inner)
        return self.compress.numel() + sum(part.nbytes for part in parts if part is not None)


@dataclass(frozen=True)
class Tables:
    """What tokens and past choices say to all places at once, in half precision.

    `token` is (vocabulary, places, w), `previous` (vocabulary, w) is for place 0 alone, `bias`
    (places, w) in float32, `past` (layers, experts, 2, w): what a choice of that layer says to the
    two places that guess it, faded by half every `half_life_tokens`.
    """

    token: Tensor
    previous: Tensor
    bias: Tensor
    past: Tensor
    half_life_tokens: float


@dataclass(frozen=True)
class Heads:
    """All learned heads of one model; `places` has one entry per MoE layer."""

    places: tuple[Head, ...]
    tables: Tables
    experts: int
    top_k: int

    @property
    def inner(self) -> int:
        return self.places[0].second.values.shape[1]

    def bytes_per_token(self) -> int:
        """Bytes of weights read to guess for one token at every place."""
        width = self.tables.bias.shape[1]
        layers = len(self.places)
        rows = layers + 1 + layers * self.top_k * 2 + (layers - 1) * self.top_k
        row_bytes = width * _TABLE_BYTES
        return sum(head.dense_bytes for head in self.places) + rows * row_bytes

    def to(self, device: torch.device) -> Heads:
        """Return the same heads on `device`. A CPU gets them widened, once for all.

        There widening at every use would cost more than reading four bytes does.
        """
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        if device.type == "cpu":
            tensors = {name: tensor.float() for name, tensor in tensors.items()}
        return heads_from(tensors, len(self.places), self.top_k, self.tables.half_life_tokens)

    def tensors(self) -> dict[str, Tensor]:
        """Return all weights by name, as a file holds them."""
        tables = self.tables
        found = {"token": tables.token, "previous": tables.previous}
        found |= {"bias": tables.bias, "past": tables.past}
        for number, head in enumerate(self.places):
            found[f"{number}.compress"] = head.compress
            if head.routed is not None:
                found[f"{number}.routed"] = head.routed
            for name in ("first", "second", "gate", "inner"):
                part: Packed | None = getattr(head, name)
                if part is not None:
                    found[f"{number}.{name}"] = part.values
                    found[f"{number}.{name}.scales"] = part.scales
        return found


def heads_from(
    tensors: Mapping[str, Tensor], places: int, top_k: int, half_life_tokens: float
) -> Heads:
    """Put heads together from named weights; large tables may be given as two thin factors.

    Raises:
        KeyError: a tensor is missing.
        RuntimeError: factors do not fit each other.
    """

    def packed(name: str) -> Packed:
        return Packed(tensors[name], tensors[f"{name}.scales"])

    found = []
    for number in range(places):
        middle = f"{number}.gate" in tensors
        found.append(
            Head(
                compress=tensors[f"{number}.compress"],
                first=packed(f"{number}.first"),
                second=packed(f"{number}.second"),
                routed=tensors[f"{number}.routed"] if number else None,
                gate=packed(f"{number}.gate") if middle else None,
                inner=packed(f"{number}.inner") if middle else None,
            )
        )
    bias = tensors["bias"]
    token, previous = (_whole(tensors, name) for name in ("token", "previous"))
    tables = Tables(
        token.view(-1, places, bias.shape[-1]), previous, bias, tensors["past"], half_life_tokens
    )
    return Heads(tuple(found), tables, tables.past.shape[1], top_k)


def _whole(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name in tensors:
        return tensors[name]
    return (tensors[f"{name}.code"].float() @ tensors[f"{name}.said"].float()).half()


def pack(matrix: Tensor) -> Packed:
    """Round a matrix to int8 with one scale per row."""
    scales = matrix.float().abs().amax(dim=1).clamp(min=1e-12) / INT8_MAX
    values = (matrix.float() / scales.unsqueeze(1)).round().to(torch.int8)
    return Packed(values, scales)


def score(
    head: Head,
    base: Tensor,
    x: Tensor | None,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
) -> Tensor:
    """Return (tokens, 2 x experts) scores of the next two layers' experts.

    Args:
        head: the place's weights.
        base: (tokens, w), what tokens and past choices say to this place, in float32.
        x: (tokens, hidden), what the router saw; None where that is not known.
        top_k_index: (tokens, k), what it chose; None at place 0.
        top_k_weights: (tokens, k).
    """
    z: Tensor | None = None
    y = base
    if x is not None:
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        z = linear(x.to(dtype), head.compress.to(dtype))
        y = torch.addcmul(y, linear(z, head.first.values.to(dtype)).float(), head.first.scales)
    if head.routed is not None and top_k_index is not None and top_k_weights is not None:
        rows = head.routed[top_k_index].float()
        y = y + (top_k_weights.float().unsqueeze(1) @ rows).squeeze(1)
    inner = head.second.values.shape[1]
    hidden = gelu(y[:, :inner], approximate="tanh")
    if head.gate is not None and head.inner is not None and z is not None:
        gate = linear(z.float(), head.gate.values.float()) * head.gate.scales
        more = linear(hidden, head.inner.values.float()) * head.inner.scales
        hidden = hidden + gate.sigmoid() * gelu(more, approximate="tanh")
    raised = linear(hidden, head.second.values.float())
    return torch.addcmul(y[:, inner:], raised, head.second.scales)


class Past:
    """What earlier tokens say: kept from pass to pass, faded with every token. One sequence.

    Passes of several tokens are read as one sequence's prompt; they start the memory anew.
    """

    _KEPT_TOKENS = 16

    def __init__(self, heads: Heads) -> None:
        self._heads = heads
        tables = heads.tables
        layers, width, device = len(heads.places), tables.bias.shape[1], tables.bias.device
        self._fade = 0.5 ** (1.0 / tables.half_life_tokens)
        self._sum = torch.zeros(layers, 2, width, device=device)
        self._layers = torch.arange(layers, device=device)[:, None, None]
        self._chosen: list[Tensor | None] = [None] * layers
        self._token: Tensor | None = None
        self.state: Tensor | None = None
        """(1, hidden): what the last layer's router saw of the token before."""

    def saw(self, layer: int, router_input: Tensor, top_k_index: Tensor) -> None:
        """Note what `layer` saw and chose; kept by reference."""
        self._chosen[layer] = top_k_index[-self._KEPT_TOKENS :]
        if layer == len(self._chosen) - 1:
            self.state = router_input[-1:]

    def forget(self) -> None:
        """Begin anew, as for another conversation."""
        self._sum.zero_()
        self._chosen = [None] * len(self._chosen)
        self._token = self.state = None

    def base(self, token_ids: Tensor) -> Tensor:
        """Begin a pass: return (tokens, places, w) of what is known before it, in float32."""
        tables = self._heads.tables
        base = tables.token[token_ids].float() + tables.bias
        self._take_up()
        if token_ids.shape[0] == 1:
            base[0] += self._sum[:, 0]
            base[0, :-1] += self._sum[1:, 1]
            if self._token is not None:
                base[0, 0] += tables.previous[self._token][0]
        else:
            self._sum.zero_()
            self.state = None
        self._token = token_ids[-1:]  # a number alone would be waited for when it is looked up
        return base

    def _take_up(self) -> None:
        """Add the choices of the pass before to the memory."""
        chosen = [index for index in self._chosen if index is not None]
        self._chosen = [None] * len(self._chosen)
        if len(chosen) < len(self._chosen) or len({index.shape for index in chosen}) > 1:
            return
        index = torch.stack(chosen)
        rows = self._heads.tables.past[self._layers, index].sum(dim=2).float()
        tokens = index.shape[1]
        if tokens > 1:
            ago = torch.arange(tokens - 1, -1, -1, device=rows.device)
            rows = rows * (self._fade**ago)[None, :, None, None]
        self._sum.mul_(self._fade**tokens).add_(rows.sum(dim=1))
