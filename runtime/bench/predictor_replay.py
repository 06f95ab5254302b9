"""Replaying a predictor on read chats: what it recalls of the routed experts and of the misses."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.bench.predictor_reading import Reading
from runtime.core import ExpertId
from runtime.predictor import Predictor
from runtime.predictor_open import LearningPredictor
from runtime.trace import Prediction

SEEDING_TOKENS = 16
"""How many of a prompt's last tokens fill the pool before an answer."""


@dataclass
class Tally:
    """Counts of one (layer, distance) over decoded tokens."""

    routed: int = 0
    met_at_k: int = 0
    met_at_2k: int = 0
    missing: int = 0
    missing_met: int = 0
    fetched: int = 0

    def figures(self, top_k: int) -> dict[str, float]:
        """Recall and precision of the routed set, and of misses at the deployed budget of k."""
        routed, missing = max(1, self.routed), max(1, self.missing)
        return {
            "recall_at_k": self.met_at_k / routed,
            "recall_at_2k": self.met_at_2k / routed,
            "precision_at_k": self.met_at_k / routed,
            "precision_at_2k": self.met_at_2k / routed / 2,
            "recall_of_misses": self.missing_met / missing,
            "precision_of_misses": self.missing_met / max(1, self.fetched),
            "missing_per_token": self.missing * top_k / routed,
        }


class Pool:
    """Which experts are resident: the least recently used leave, all layers share the slots."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._resident: OrderedDict[ExpertId, None] = OrderedDict()

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._resident

    def use(self, expert: ExpertId) -> None:
        """Serve an expert; it is resident afterwards."""
        self._resident[expert] = None
        self._resident.move_to_end(expert)
        if len(self._resident) > self._slots:
            self._resident.popitem(last=False)


Tallies = dict[tuple[int, int], Tally]


def replay(
    predictor: Predictor,
    readings: Sequence[Reading],
    slots: int,
    idle_s: float = 0.0,
) -> Tallies:
    """Show each chat's prompt at once and its answer token by token; count on the answers.

    Between chats the predictor may learn for `idle_s` seconds, if it can. The pool holds `slots`
    experts and never sees a guess: what is missing is the same for every predictor.
    """
    tallies: Tallies = {}
    pool = Pool(slots)
    layers = len(readings[0].chosen)
    for reading in readings:
        _pass(predictor, reading, 0, reading.prompt)
        for token in range(max(0, reading.prompt - SEEDING_TOKENS), reading.prompt):
            for layer in range(layers):
                for expert in reading.chosen[layer][token].tolist():
                    pool.use(ExpertId(layer, expert))
        for token in range(reading.prompt, len(reading.tokens)):
            made = _pass(predictor, reading, token, token + 1)
            _count(tallies, pool, made, [chosen[token].tolist() for chosen in reading.chosen])
        if idle_s and isinstance(predictor, LearningPredictor):
            predictor.improve(idle_s)
    return tallies


def _pass(predictor: Predictor, reading: Reading, begin: int, end: int) -> list[Prediction]:
    with torch.inference_mode():
        made = list(predictor.begin_pass(reading.tokens[begin:end]).read())
        for layer, (x, chosen, weights) in enumerate(
            zip(reading.inputs, reading.chosen, reading.weights, strict=True)
        ):
            pending = predictor.launch(layer, x[begin:end], chosen[begin:end], weights[begin:end])
            made += pending.read()
    return made


def _count(
    tallies: Tallies, pool: Pool, made: Sequence[Prediction], routed: Sequence[Sequence[int]]
) -> None:
    by_layer: dict[int, list[Prediction]] = {}
    for prediction in made:
        by_layer.setdefault(prediction.layer, []).append(prediction)
    for layer, wanted in enumerate(routed):
        missing = {e for e in wanted if ExpertId(layer, e) not in pool}
        for prediction in by_layer.get(layer, ()):
            tally = tallies.setdefault((layer, prediction.distance), Tally())
            experts = [guess.expert for guess in prediction.guesses]
            best = experts[: len(wanted)]
            tally.routed += len(wanted)
            tally.met_at_k += len(set(wanted) & set(best))
            tally.met_at_2k += len(set(wanted) & set(experts))
            tally.missing += len(missing)
            tally.missing_met += len(missing & set(best))
            tally.fetched += sum(ExpertId(layer, e) not in pool for e in best)
        for expert in wanted:
            pool.use(ExpertId(layer, expert))
