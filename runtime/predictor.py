"""LLaPor's place in the engine: guesses the experts of the next two layers at every layer.

Without any training it reuses the routers themselves (`runtime.predictor_reuse`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from runtime.predictor_ranking import Curve, Ranked, predictions_from, rank, rank_alike
from runtime.predictor_reuse import (
    RouterView,
    folded,
    folded_from_residual,
    targets_of,
    unit_rms,
)
from runtime.trace import Prediction

MAX_TOKENS = 32
"""A pass of more tokens needs nearly every expert; guessing would be work for nothing."""

TOKENS = -1
"""The place before the first layer, where only the tokens are known."""

_SLOPE_PER_SPREAD = 2.5


@dataclass(frozen=True)
class _Source:
    """What is guessed at one place: its targets and the one product that scores all of them."""

    targets: tuple[tuple[int, int], ...]
    views: tuple[RouterView, ...]
    top_ks: tuple[int, ...]
    curves: tuple[Curve, ...]
    matrix: Tensor
    bias: Tensor | None
    alike: bool


class _Nothing:
    def read(self) -> tuple[Prediction, ...]:
        return ()


NOTHING = _Nothing()


class _Guessed:
    """Guesses on their way; implements `runtime.prediction.Pending`."""

    def __init__(self, owner: Predictor, source: _Source, ranked: Ranked) -> None:
        self._owner, self._source, self._ranked = owner, source, ranked

    def read(self) -> tuple[Prediction, ...]:
        began_s = time.perf_counter()
        source = self._source
        made = predictions_from(self._ranked, source.targets, source.top_ks, source.curves)
        self._owner.seconds += time.perf_counter() - began_s
        return made


class Predictor:
    """Implements `runtime.prediction.ExpertPredictor`. Engine thread only.

    `views` has one entry per MoE layer, None where its router could not be understood: nothing is
    guessed for or from such a layer. `embedding` is the model's (vocabulary, hidden) table or None.
    `dtype` is that of the router inputs. `seconds` is the host time spent in guessing so far.
    """

    def __init__(
        self,
        views: Sequence[RouterView | None],
        embedding: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._views = tuple(views)
        self._embedding = embedding
        self._dtype = dtype
        self._sources = {
            place: source
            for place in range(TOKENS, len(self._views))
            if (source := self._reuse(place)) is not None
        }
        read = sum(_bytes(source) for source in self._sources.values())
        self.weight_bytes = -(-read // max(1, len(self._views)))
        self.seconds = 0.0

    def begin_pass(self, token_ids: Tensor) -> _Guessed | _Nothing:
        """Guess the first two layers from the pass's tokens; `token_ids` is (tokens,)."""
        source = self._sources.get(TOKENS)
        if source is None or token_ids.shape[0] > MAX_TOKENS:
            return NOTHING
        assert self._embedding is not None
        began_s = time.perf_counter()
        residual = unit_rms(self._embedding[token_ids.to(self._embedding.device)])
        ranked = _ranked(source, residual.to(device=source.matrix.device, dtype=self._dtype))
        self.seconds += time.perf_counter() - began_s
        return _Guessed(self, source, ranked)

    def launch(
        self, layer: int, router_input: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> _Guessed | _Nothing:
        """Guess layers `layer` + 1 and + 2 from what the router of `layer` saw and chose."""
        source = self._sources.get(layer)
        if source is None or router_input.shape[0] > MAX_TOKENS:
            return NOTHING
        began_s = time.perf_counter()
        ranked = _ranked(source, router_input)
        self.seconds += time.perf_counter() - began_s
        return _Guessed(self, source, ranked)

    def improve(self, budget_s: float) -> None:
        """Learn from what was seen for up to `budget_s` seconds."""

    def reset(self) -> None:
        """Forget what was learned on this machine, on disk as well."""

    def _reuse(self, place: int) -> _Source | None:
        """Fold what can be guessed at one place without training; None where nothing can."""
        targets = targets_of(place, self._views)
        source = self._views[place] if place != TOKENS else None
        if not targets or (self._embedding is None if place == TOKENS else source is None):
            return None
        views = tuple(view for _, _, view in targets)
        matrices = [folded_from_residual(v) if source is None else folded(source, v) for v in views]
        rows = [torch.zeros(v.experts) if v.bias is None else v.bias.float().cpu() for v in views]
        bias = torch.cat(rows) if any(view.bias is not None for view in views) else None
        alike = all(v.scoring == "logits" and v.selection_bias is None for v in views)
        alike = alike and len({(v.experts, v.top_k) for v in views}) == 1
        matrix = torch.cat(matrices).to(self._dtype)
        return _Source(
            targets=tuple((layer, distance) for distance, layer, _ in targets),
            views=views,
            top_ks=tuple(view.top_k for view in views),
            curves=tuple(_first_curve(view, m) for view, m in zip(views, matrices, strict=True)),
            matrix=matrix,
            bias=None if bias is None else bias.to(device=matrix.device, dtype=self._dtype),
            alike=alike,
        )


def _ranked(source: _Source, x: Tensor) -> Ranked:
    logits = linear(x, source.matrix, source.bias).float()
    if source.alike and x.shape[0] == 1:
        return rank_alike(logits.view(len(source.views), -1), source.top_ks[0])
    parts = torch.split(logits, [view.experts for view in source.views], dim=1)
    scores = [view.scored(part) for view, part in zip(source.views, parts, strict=True)]
    return rank(scores, source.top_ks, source.curves)


def _first_curve(view: RouterView, matrix: Tensor) -> Curve:
    """A curve for scores nobody has measured yet: their spread on random inputs is the unit."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, matrix.shape[1], generator=generator).to(matrix.device)
    spread = float(view.scored(x @ matrix.T).float().std())
    return Curve(_SLOPE_PER_SPREAD / max(spread, 1e-9), 0.0)


def _bytes(source: _Source) -> int:
    return source.matrix.nbytes + (0 if source.bias is None else source.bias.nbytes)
