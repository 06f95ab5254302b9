"""MoE-Infinity's activation tracing: what a request used says what it will use.

Xue et al., "MoE-Infinity: efficient MoE inference on personal machines with sparsity-aware expert
cache" (arXiv 2401.14361). While a request runs, the tokens given to each expert are counted, once
per forward pass (iteration level, reset every pass) and over the request (request level), prompt
and decoding apart. Finished requests are kept in a collection. The running one is matched with it
by cosine similarity, and the best match stands for the rest of the request: its activation ratios
times the proximity of the layer order prefetches; for eviction they are averaged with the
request's own, as the paper's versions use one (v3) or the other (v2), and both together hit more
than either. Before anything was collected the request's own ratios stand in.

The authors' public code does less: in its snapshot of March 2026 the calls that predict and
prefetch are commented out for most families, prefetching is off by default, and the resident
expert with the fewest visits leaves. This follows the paper, as the stronger rival.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from runtime.activation_tracing_collection import ActivationMatrix, Collection, Floats, Match
from runtime.core import ExpertId

CAPACITY = 120
"""The paper: about 120 matrices, 3 % of the requests, capture most patterns."""

TRIFLE = 1e-6
"""A ratio for experts that the match did not use, so that depth still orders them."""

DEPTH_WEIGHT = 0.25
"""How far the worth of an expert falls from the first layer to the last. The paper says that
shallow layers are favoured; its priority of prefetches, 1 - i / L, taken over as it is (a weight
of 1) loses hits, because deep layers then hardly keep anything."""

Level = Literal["iteration", "request"]


class MoeInfinityTracer:
    """Traces one request after another and predicts from the collection.

    `level` says what is matched: the pass under way, of which only the layers so far are known,
    or the request so far. Requests that are served together are traced as one.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        *,
        level: Level = "iteration",
        capacity: int = CAPACITY,
        depth_weight: float = DEPTH_WEIGHT,
        collection: Collection | None = None,
    ) -> None:
        self.layers, self.experts = layers, experts
        if collection is None:
            collection = Collection(2 * layers, experts, capacity)
        self.collection = collection
        assert (self.collection.rows, self.collection.experts) == (2 * layers, experts)
        self.changes = 0
        self._level = level
        self._match = Match(self.collection)
        self._other = ActivationMatrix(2 * layers, experts)
        self._best: tuple[int, float] | None = None
        self._entry = np.zeros((2 * layers, experts))
        self._prompt = False
        self._matched = True
        layer = np.arange(layers)
        # [current layer + 1, later layer]: row 0 looks from before the first layer.
        ahead = layer[None, :] - np.arange(-1, layers)[:, None]
        self._proximity = np.where(ahead > 0, 1.0 - ahead / layers, 0.0)
        self._depth = (1.0 - depth_weight * layer / layers)[:, None]
        self._reuse = np.zeros((layers, experts))
        self._reuse_of = -1

    @property
    def iteration(self) -> ActivationMatrix:
        """What the pass under way activated, [2 x layers, experts]; prompt rows come first."""
        return self._match.matrix if self._level == "iteration" else self._other

    @property
    def request(self) -> ActivationMatrix:
        """What the request activated so far, [2 x layers, experts]; prompt rows come first."""
        return self._match.matrix if self._level == "request" else self._other

    def begin_request(self) -> None:
        """A request begins; nothing is known of it."""
        self._match = Match(self.collection)
        self._other.clear()
        self._best, self._matched = None, True
        self.changes += 1

    def begin_pass(self, *, prompt: bool) -> None:
        """A forward pass begins, over tokens of the prompt or over generated ones."""
        if self._level == "iteration":
            # Until the new pass has a layer to match by, the last pass's match stands.
            self._settle()
            self._match.clear()
            self._matched = True
        else:
            self._other.clear()
        self._prompt = prompt
        self.changes += 1

    def routed(self, layer: int, demands: Mapping[int, int]) -> None:
        """Count what the router of MoE layer `layer` chose: expert -> tokens."""
        row = layer if self._prompt else self.layers + layer
        self._match.add(row, demands)
        self._other.add(row, demands)
        self._matched = False
        self.changes += 1

    def end_request(self) -> None:
        """The request is over: keep its matrix, if it has one."""
        if self.request.totals.any():
            self.collection.add(self.request)
        self.begin_request()

    def matched(self) -> tuple[int, float] | None:
        """Return the best match so far, as its place in the collection and its similarity."""
        self._settle()
        return self._best

    def predicted(self) -> Floats:
        """Return the expected share of each expert in its layer for the kind of pass under way.

        Of shape [layers, experts]; zero where nothing is known.
        """
        self._settle()
        known = self.request.ratios() if self._best is None else self._entry
        return self._of_kind(known, self._prompt)

    def priorities(self, layer: int) -> Floats:
        """Return how urgent a prefetch of each expert is after layer `layer`, [layers, experts].

        The predicted activation ratio times 1 - (i - layer) / L for every later layer i, zero for
        the others; `layer` is -1 before the first.
        """
        priorities: Floats = self.predicted() * self._proximity[layer + 1][:, None]
        return priorities

    def ranked(self, layer: int, most: int) -> list[tuple[ExpertId, float]]:
        """Return the most urgent experts with their priorities, the most urgent first."""
        priorities = self.priorities(layer).ravel()
        most = min(most, len(priorities))
        first = np.argpartition(-priorities, most - 1)[:most]
        first = first[np.lexsort((first, -priorities[first]))]
        return [
            (ExpertId(*divmod(int(number), self.experts)), float(priorities[number]))
            for number in first
            if priorities[number] > 0
        ]

    def reuse(self) -> Floats:
        """Return how much each expert is worth keeping for decoding, [layers, experts].

        The mean of the match's ratio and the request's own, times a factor that falls with depth:
        an expert of a shallow layer stays, because there is less time to prefetch it.
        """
        if self._reuse_of != self.changes:
            self._settle()
            reuse = self._of_kind(self.request.ratios(), prompt=False)
            if self._best is not None:
                reuse = (reuse + self._of_kind(self._entry, prompt=False)) / 2
            self._reuse = (reuse + TRIFLE) * self._depth
            self._reuse_of = self.changes
        return self._reuse

    def _of_kind(self, ratios: Floats, prompt: bool) -> Floats:
        """Return the rows of prompts or of decoding; the others where those are all empty."""
        of_prompt, of_decoding = ratios[: self.layers], ratios[self.layers :]
        first, second = (of_prompt, of_decoding) if prompt else (of_decoding, of_prompt)
        return first if first.any() else second

    def _settle(self) -> None:
        if self._matched:
            return
        before = self._best
        self._best, self._matched = self._match.best(), True
        if self._best is not None and (before is None or self._best[0] != before[0]):
            self._entry = self.collection.entry(self._best[0]).astype(np.float64, order="C")
