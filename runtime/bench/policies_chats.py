"""The chats that a cell of `bench policies` replays, from the statistics of its model's routing.

A run is a short session. Slots start full, for nothing: with the experts that other chats used
most, or layer by layer for policies that place whole layers. Then comes an earlier chat, and the
measured one begins with its prompt. Decode cells measure tokens after that prompt and a few more;
prefill cells measure two chunks of the prompt itself, with the slots as the earlier chat left
them. Only a model's first layers are generated. A pass is one forward: the dense layers of a batch
are batched too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from runtime.activation_tracing import CAPACITY
from runtime.activation_tracing_collection import ActivationMatrix, Collection
from runtime.bench.policies_cells import Cell
from runtime.bench.policies_models import MODELS
from runtime.core import ExpertId
from runtime.synthetic import STATISTICS, synthetic_trace
from runtime.trace import ForwardPass

SIMULATED_LAYERS = 12
EARLIER_SEED, MEASURED_SEED = 1, 2
SEED_STRIDE = 10_000
"""From one draw of all chats to the next: `--seed N` is the N-th after the one that is reported."""
PROMPT_TOKENS_PER_PASS = 2048
PROMPT_CHUNK = 512
DECODE_PROMPT_TOKENS = 512
PREFILL_CHUNKS = 2

COLLECTED_SEED = 1000
COLLECTED = {1: 24, 4: 12, 16: 6, 64: 6}
COLLECTED_PASSES = {1: 40, 4: 24, 16: 12, 64: 8}
COLLECTED_PROMPT_TOKENS = 128
"""Finished requests, or batches of them, that MoE-Infinity has seen, by batch; their lengths."""


@dataclass(frozen=True)
class Lengths:
    """Passes of a session: the earlier chat's, and the measured one's before and while measured."""

    earlier: int
    settling: int
    measured: int


LENGTHS = {
    1: Lengths(16, 16, 40),
    4: Lengths(10, 8, 24),
    16: Lengths(6, 4, 14),
    64: Lengths(4, 2, 8),
}


@dataclass(frozen=True)
class Session:
    """What one cell replays: all passes, of which the first `warm` are not measured."""

    passes: tuple[ForwardPass, ...]
    warm: int
    experts: tuple[int, ...]
    top_k: int

    @property
    def measured(self) -> tuple[ForwardPass, ...]:
        return self.passes[self.warm :]


def session_of(cell: Cell, seed: int = 0) -> Session:
    """Generate the chats of a cell; another seed gives other chats with the same model."""
    statistics = STATISTICS[MODELS[cell.model].routing]
    lengths = LENGTHS[cell.batch]
    layers = min(SIMULATED_LAYERS, statistics.layers)
    earlier = synthetic_trace(
        statistics,
        seed=EARLIER_SEED + SEED_STRIDE * seed,
        passes=lengths.earlier,
        batch=cell.batch,
        layers=layers,
    )
    if cell.phase == "decode":
        prompt = max(1, DECODE_PROMPT_TOKENS // cell.batch)
        chunk, decoded = prompt, lengths.settling + lengths.measured
    else:
        chunk = min(PROMPT_CHUNK, PROMPT_TOKENS_PER_PASS // cell.batch)
        prompt, decoded = PREFILL_CHUNKS * chunk, 0
    measured = synthetic_trace(
        statistics,
        seed=MEASURED_SEED + SEED_STRIDE * seed,
        passes=decoded,
        batch=cell.batch,
        prompt_tokens=prompt,
        prompt_chunk=chunk,
        layers=layers,
    )
    passes = (*earlier.passes, *measured.passes)
    count = lengths.measured if cell.phase == "decode" else PREFILL_CHUNKS
    return Session(passes, len(passes) - count, measured.experts, measured.top_k)


@lru_cache(maxsize=32)
def collected(routing: str, batch: int, seed: int = 0) -> Collection:
    """Return MoE-Infinity's collection after other chats with the same model."""
    statistics = STATISTICS[routing]
    layers = min(SIMULATED_LAYERS, statistics.layers)
    collection = Collection(2 * layers, statistics.experts, CAPACITY)
    for number in range(COLLECTED[batch]):
        chat = synthetic_trace(
            statistics,
            seed=COLLECTED_SEED + number + SEED_STRIDE * seed,
            passes=COLLECTED_PASSES[batch],
            batch=batch,
            prompt_tokens=max(2, COLLECTED_PROMPT_TOKENS // batch),
            layers=layers,
            predictions=False,
        )
        matrix = ActivationMatrix(2 * layers, statistics.experts)
        for forward in chat.passes:
            first = 0 if forward.span > 1 else layers  # rows of prompts come first
            for layer, step in enumerate(forward.layers):
                matrix.add(first + layer, step.demands)
        collection.add(matrix)
    return collection


def preloaded(
    routing: str, batch: int, slots: int, by_layer: bool, seed: int = 0
) -> list[ExpertId]:
    """Return what `slots` slots hold at first: the first layers' experts, or the most used."""
    collection = collected(routing, batch, seed)
    layers, experts = collection.rows // 2, collection.experts
    use = np.zeros(layers * experts)
    for index in range(0 if by_layer else len(collection)):
        use += collection.entry(index)[layers:].ravel()
    chosen = np.argsort(-use, kind="stable")[:slots]
    return [ExpertId(*divmod(int(number), experts)) for number in chosen]
