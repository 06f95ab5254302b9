"""LLaPor's place in the engine: guesses the experts of the next two layers at every layer.

Without any training it reuses the routers themselves (`runtime.predictor_reuse`); learned heads
(`runtime.predictor_heads`) replace that per (layer, distance) while they do better on live tokens.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.predictor_heads import Head, Heads, Past, score
from runtime.predictor_memory import Memory
from runtime.predictor_ranking import Curve, Ranked, predictions_from, rank, rank_alike
from runtime.predictor_reuse import RouterView, unit_rms
from runtime.predictor_slots import Slot, make_slots
from runtime.trace import Prediction

MAX_TOKENS = 32
"""A pass of more tokens needs nearly every expert; guessing would be work for nothing."""


class Target(NamedTuple):
    """MoE layer `layer`, as guessed `distance` layers before it."""

    layer: int
    distance: int


class SlotFigures(NamedTuple):
    """One (layer, distance): recall at k of what is in use and of router reuse, running averages
    over live tokens (as many guesses as routed experts, so precision is the same)."""

    layer: int
    distance: int
    learned_on: bool
    recall_at_k: float
    reuse_recall_at_k: float


@dataclass(frozen=True)
class _Source:
    """All guesses made at one place. `matrix` scores the targets whose routers are reused, in the
    order of `reused`; `head` scores the others."""

    slots: tuple[Slot, ...]
    targets: tuple[tuple[int, int], ...]
    top_ks: tuple[int, ...]
    reused: tuple[int, ...]
    matrix: Tensor | None
    bias: Tensor | None
    head: Head | None
    extra: Tensor | None
    alike: bool

    @property
    def curves(self) -> tuple[Curve, ...]:
        return tuple([slot.curve for slot in self.slots])

    @property
    def nbytes(self) -> int:
        tensors = (self.matrix, self.bias, self.extra)
        dense = self.head.dense_bytes if self.head is not None else 0
        return dense + sum(tensor.nbytes for tensor in tensors if tensor is not None)


class _Nothing:
    flat: Tensor | None = None

    def read(self, flat: Tensor | None = None) -> tuple[Prediction, ...]:
        return ()


NOTHING = _Nothing()


class _Guessed:
    """Guesses on their way; implements `runtime.prediction.Pending`."""

    def __init__(self, owner: Predictor, source: _Source, ranked: Ranked) -> None:
        self._owner, self._source, self._ranked = owner, source, ranked
        self.flat: Tensor | None = ranked.flat

    def read(self, flat: Tensor | None = None) -> tuple[Prediction, ...]:
        began_s = time.perf_counter()
        source = self._source
        made = predictions_from(self._ranked, source.targets, source.top_ks, source.curves, flat)
        self._owner.seconds += time.perf_counter() - began_s
        return made


class Predictor:
    """Guesses experts and learns which of its two ways of guessing is better. Engine thread only.

    `views` has one entry per MoE layer, None where its router could not be understood: it is then
    neither reused nor guessed from without learned `heads`. `embedding` is the model's
    (vocabulary, hidden) table or None. `dtype` is that of the router inputs. `seconds` is the host
    time spent in guessing so far.
    """

    def __init__(
        self,
        views: Sequence[RouterView | None],
        embedding: Tensor | None,
        dtype: torch.dtype,
        heads: Heads | None = None,
    ) -> None:
        self.views = tuple(views)
        self.heads = heads
        self.embedding = None if embedding is None else embedding.detach()
        self.dtype = dtype
        self.slots = make_slots(self.views, embedding is not None, heads)
        known = [view for view in self.views if view is not None]
        width = max((view.weight.shape[1] for view in known), default=0)
        self.memory = Memory(len(self.views), len(self.views) * width * dtype.itemsize)
        self.past = Past(heads) if heads is not None else None
        self.seconds = 0.0
        self._base: Tensor | None = None
        self._sources: list[_Source | None] = [None] * len(self.views)
        self.weight_bytes = 0
        self.rebuild()

    def rebuild(self, place: int | None = None) -> None:
        """Put together again what is multiplied at one place, or at all, after slots changed."""
        places = range(len(self.views)) if place is None else (place,)
        for one in places:
            self._sources[one] = self._source(one)
        made = [source for source in self._sources if source is not None]
        rows = 0
        if self.heads is not None and any(source.head is not None for source in made):
            dense = sum(head.dense_bytes for head in self.heads.places)
            rows = self.heads.bytes_per_token() - dense
        read = sum(source.nbytes for source in made) + rows
        self.weight_bytes = -(-read // max(1, len(self.views)))

    def begin_pass(self, token_ids: Tensor) -> _Guessed | _Nothing:
        """Guess the first two layers from the pass's tokens; `token_ids` is (tokens,)."""
        tokens = token_ids.shape[0]
        began_s = time.perf_counter()
        state = self.past.state if self.past is not None and tokens == 1 else None
        self._base = None
        if self.past is not None:
            if tokens <= MAX_TOKENS:
                self._base = self.past.base(token_ids)
            else:
                self.past.forget()
        self.memory.begin(token_ids, self._base, state)
        source = self._sources[0] if self._sources and tokens <= MAX_TOKENS else None
        ranked = None
        if source is not None:
            x = self._residual(token_ids) if source.matrix is not None else None
            base = None if self._base is None else self._base[:, 0]
            ranked = _ranked(source, x, base, state)
        self.seconds += time.perf_counter() - began_s
        if source is None or ranked is None:
            return NOTHING
        return _Guessed(self, source, ranked)

    def launch(
        self, layer: int, router_input: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> _Guessed | _Nothing:
        """Guess layers `layer` + 1 and + 2 from what the router of `layer` saw and chose."""
        began_s = time.perf_counter()
        if self.past is not None:
            self.past.saw(layer, router_input, top_k_index)
        self.memory.saw(layer, router_input, top_k_index, top_k_weights)
        tokens, place = router_input.shape[0], layer + 1
        source = self._sources[place] if place < len(self._sources) else None
        ranked = None
        if source is not None and tokens <= MAX_TOKENS:
            known = self._base is not None and self._base.shape[0] == tokens
            base = self._base[:, place] if known and self._base is not None else None
            ranked = _ranked(source, router_input, base, None, top_k_index, top_k_weights)
        self.seconds += time.perf_counter() - began_s
        if source is None or ranked is None:
            return NOTHING
        return _Guessed(self, source, ranked)

    def figures(self) -> tuple[SlotFigures, ...]:
        """Return what is known of every slot: running recalls on live tokens."""
        return tuple(
            SlotFigures(
                slot.layer,
                slot.distance,
                slot.shadow.learned_on,
                slot.shadow.in_use.recall,
                slot.shadow.reuse.recall,
            )
            for slot in self.slots
        )

    def _residual(self, token_ids: Tensor) -> Tensor:
        assert self.embedding is not None
        rows = self.embedding[token_ids.to(self.embedding.device)]
        return unit_rms(rows).to(device=token_ids.device, dtype=self.dtype)

    def _source(self, place: int) -> _Source | None:
        slots = tuple(slot for slot in self.slots if slot.place == place and slot.usable)
        if not slots:
            return None
        reused = tuple(n for n, slot in enumerate(slots) if not slot.shadow.learned_on)
        matrices = [slots[n].matrix() for n in reused]
        biases = [slots[n].bias() for n in reused]
        learned = self.heads is not None and len(reused) < len(slots)
        return _Source(
            slots=slots,
            targets=tuple((slot.layer, slot.distance) for slot in slots),
            top_ks=tuple(slot.top_k for slot in slots),
            reused=reused,
            matrix=torch.cat(matrices).to(self.dtype) if reused else None,
            bias=torch.cat(biases).to(self.dtype) if any(b.any() for b in biases) else None,
            head=self.heads.places[place] if learned and self.heads is not None else None,
            extra=_extra(slots) if learned else None,
            alike=len({(slot.experts, slot.top_k) for slot in slots}) == 1
            and all(slot.plain for slot in slots),
        )


def _extra(slots: Sequence[Slot]) -> Tensor | None:
    """Return (2 x experts,), what was learned here on top of a head; None if that is nothing."""
    parts = [slot.head_bias for slot in slots]
    known = next((part for part in parts if part is not None), None)
    if known is None:
        return None
    empty = torch.zeros_like(known)
    by_distance = {slot.distance: slot.head_bias for slot in slots}
    found = [by_distance.get(distance) for distance in (1, 2)]
    return torch.cat([empty if part is None else part for part in found])


def _ranked(
    source: _Source,
    x: Tensor | None,
    base: Tensor | None,
    state: Tensor | None,
    top_k_index: Tensor | None = None,
    top_k_weights: Tensor | None = None,
) -> Ranked | None:
    """Score and rank one place's targets; None if what is in use cannot be asked just now."""
    learned: Tensor | None = None
    if source.head is not None:
        if base is None:
            return None
        seen = state if top_k_index is None else x
        learned = score(source.head, base, seen, top_k_index, top_k_weights)
        if source.extra is not None:
            learned = learned + source.extra
    if learned is not None and not source.reused and source.alike and learned.shape[0] == 1:
        count = len(source.slots)
        return rank_alike(learned.view(2, -1)[:count], source.top_ks[0])
    logits: Tensor | None = None
    if source.matrix is not None:
        assert x is not None
        logits = linear(x.to(source.matrix.dtype), source.matrix, source.bias).float()
        if learned is None and source.alike and logits.shape[0] == 1:
            return rank_alike(logits.view(len(source.slots), -1), source.top_ks[0])
    scores, begin = [], 0
    for number, slot in enumerate(source.slots):
        if number in source.reused:
            assert logits is not None
            assert slot.view is not None
            scores.append(slot.view.scored(logits[:, begin : begin + slot.experts]))
            begin += slot.experts
        else:
            assert learned is not None
            scores.append(learned[:, (slot.distance - 1) * slot.experts :][:, : slot.experts])
    return rank(scores, source.top_ks, source.curves)
