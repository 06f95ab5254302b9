"""What a routing trace is made of: passes, layers, the router's choices and the predictions.

A trace comes from real generation (`runtime.recorder`) or from statistics (`runtime.synthetic`);
the simulator replays either. Pure records, and their file form.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ModelFilesError

Experts = NDArray[np.int64]
Scores = NDArray[np.float64]

FORMAT_VERSION = 1


class Guess(NamedTuple):
    """An expert that may be routed, and the predictor's own score for that, 0 to 1."""

    expert: int
    probability: float


class Prediction:
    """Guesses for MoE layer `layer`, made `distance` layers before it; the likeliest first.

    `experts` and `scores` are arrays of the guesses' experts and the predictor's own scores for
    them, 0 to 1; nobody changes them.
    """

    __slots__ = ("distance", "experts", "layer", "scores")

    def __init__(self, layer: int, distance: int, experts: Experts, scores: Scores) -> None:
        assert experts.shape == scores.shape, (experts.shape, scores.shape)
        # Compiled loops are made for these types, and once more for any other.
        assert experts.dtype == np.int64, experts.dtype
        assert scores.dtype == np.float64, scores.dtype
        self.layer = layer
        self.distance = distance
        self.experts = experts
        self.scores = scores

    @classmethod
    def of(cls, layer: int, distance: int, guesses: Sequence[Guess]) -> Prediction:
        """Put guesses one by one into arrays."""
        experts = np.array([guess.expert for guess in guesses], np.int64)
        scores = np.array([guess.probability for guess in guesses], np.float64)
        return cls(layer, distance, experts, scores)

    @property
    def guesses(self) -> tuple[Guess, ...]:
        """The guesses one by one."""
        return tuple(map(Guess, self.experts.tolist(), self.scores.tolist()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prediction) and (self.layer, self.distance, self.guesses) == (
            other.layer,
            other.distance,
            other.guesses,
        )

    def __hash__(self) -> int:
        return hash((self.layer, self.distance, self.guesses))

    def __repr__(self) -> str:
        return f"Prediction({self.layer}, {self.distance}, {self.guesses})"


@dataclass(frozen=True)
class LayerStep:
    """One MoE layer of a pass: `demands` maps each routed expert, ascending, to its tokens.

    `recency` weighs the experts of the last tokens of a prompt, 0.5 ** (tokens ago / 16) summed;
    None where every token counts once (decode). `predictions` were made when this layer was
    routed, for layers after it.
    """

    demands: Mapping[int, int]
    predictions: tuple[Prediction, ...] = ()
    recency: Mapping[int, float] | None = None

    @cached_property
    def chosen(self) -> Experts:
        """The routed experts."""
        return np.fromiter(self.demands, np.int64, len(self.demands))


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass: `tokens` rows through every MoE layer, `span` of them one after another.

    `span` is 1 in decode, whatever the batch, and the chunk's length in a prompt: how far time,
    counted in tokens, moves on. `predictions` were made from the tokens, before layer 0. The rows
    go through the dense layers in `forwards` calls, one where sequences are batched there.
    """

    tokens: int
    layers: tuple[LayerStep, ...]
    predictions: tuple[Prediction, ...] = ()
    span: int = 1
    forwards: int = 1


@dataclass(frozen=True)
class Trace:
    """Passes of one model in order, and what a reader should know about them.

    `experts` is the number of experts of each layer, `top_k` how many a token uses; `origin` says
    where it comes from.
    """

    experts: tuple[int, ...]
    top_k: int
    origin: str
    passes: tuple[ForwardPass, ...] = field(default=())


def save_trace(path: Path, trace: Trace) -> None:
    """Write a trace as gzipped JSON lines: a header, then one pass per line."""
    header = {
        "format": FORMAT_VERSION,
        "experts": trace.experts,
        "top_k": trace.top_k,
        "origin": trace.origin,
    }
    with gzip.GzipFile(path, "wb", mtime=0) as file:
        for line in (header, *map(_pass_to_json, trace.passes)):
            file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")


def load_trace(path: Path) -> Trace:
    """Read what `save_trace` wrote.

    Raises:
        ModelFilesError: the file is damaged or of another version.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        header = lines[0]
        if header["format"] != FORMAT_VERSION:
            raise ValueError(f"its format is {header['format']}, not {FORMAT_VERSION}")
        passes = tuple(map(_pass_from_json, lines[1:]))
        return Trace(tuple(header["experts"]), header["top_k"], header["origin"], passes)
    except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ModelFilesError(
            f"The trace {path} cannot be read: {error}.", "Record it again."
        ) from error


def _pass_to_json(forward: ForwardPass) -> dict[str, Any]:
    return {
        "t": forward.tokens,
        "s": forward.span,
        "f": forward.forwards,
        "p": _predictions_to_json(forward.predictions),
        "l": [
            [
                list(step.demands.items()),
                _predictions_to_json(step.predictions),
                None if step.recency is None else list(step.recency.items()),
            ]
            for step in forward.layers
        ],
    }


def _pass_from_json(value: dict[str, Any]) -> ForwardPass:
    layers = tuple(
        LayerStep(
            dict(demands),
            _predictions_from_json(predictions),
            None if recency is None else dict(recency),
        )
        for demands, predictions, recency in value["l"]
    )
    predictions = _predictions_from_json(value["p"])
    return ForwardPass(value["t"], layers, predictions, value["s"], value.get("f", 1))


def _predictions_to_json(predictions: Sequence[Prediction]) -> list[Any]:
    return [
        [p.layer, p.distance, [[g.expert, round(g.probability, 6)] for g in p.guesses]]
        for p in predictions
    ]


def _predictions_from_json(values: list[Any]) -> tuple[Prediction, ...]:
    return tuple(
        Prediction.of(layer, distance, [Guess(e, p) for e, p in guesses])
        for layer, distance, guesses in values
    )
