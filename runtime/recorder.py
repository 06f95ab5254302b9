"""Records what a model routes while it generates: a trace for the simulator, rows for training.

A recorder stands where the executor's predictor stands and passes everything on to the one inside,
so that what it records is what the engine really saw, with that predictor's guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from runtime.core import ExpertId
from runtime.device_host import HostDevice
from runtime.executor import MoeLayer
from runtime.kernels import views
from runtime.layer_rows import RoutedTokens, open_rows, recency_of
from runtime.prediction import ExpertPredictor, Pending
from runtime.store import ExpertStore
from runtime.trace import ForwardPass, LayerStep, Prediction, Trace


@dataclass
class RecordedPass:
    """One forward pass of one sequence. `tokens` (T,); per MoE layer `inputs` (T, hidden) in half
    precision, `chosen` (T, k), `weights` (T, k) and the guesses made there; all on the CPU."""

    tokens: Tensor
    from_tokens: tuple[Prediction, ...] = ()
    inputs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    guesses: list[tuple[Prediction, ...]] = field(default_factory=list)


class Recorder:
    """Implements `runtime.prediction.ExpertPredictor` around another one. Engine thread only.

    Guesses are read at once, so a recorded run waits for them earlier than it otherwise would.
    """

    def __init__(self, inside: ExpertPredictor) -> None:
        self.inside = inside
        self.weight_bytes = inside.weight_bytes
        self.passes: list[RecordedPass] = []

    def begin_pass(self, token_ids: Tensor) -> Pending:
        """Start a pass and pass on what is guessed from its tokens."""
        made = self.inside.begin_pass(token_ids).read()
        self.passes.append(RecordedPass(token_ids.detach().cpu().clone(), made))
        return _Read(made)

    def launch(
        self, layer: int, router_input: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Pending:
        """Keep what the router of `layer` saw and chose, and pass on what is guessed from it."""
        made = self.inside.launch(layer, router_input, top_k_index, top_k_weights).read()
        now = self.passes[-1]
        assert layer == len(now.chosen), f"layer {layer} follows {len(now.chosen) - 1}"
        now.inputs.append(router_input.detach().to("cpu", torch.float16, copy=True))
        now.chosen.append(top_k_index.detach().to("cpu", copy=True))
        now.weights.append(top_k_weights.detach().to("cpu", torch.float16, copy=True))
        now.guesses.append(made)
        return _Read(made)

    def improve(self, budget_s: float) -> None:
        """Let the predictor inside learn."""
        self.inside.improve(budget_s)

    def reset(self) -> None:
        """Let the predictor inside forget; what is recorded stays."""
        self.inside.reset()

    def trace(self, experts: Sequence[int], origin: str) -> Trace:
        """Return the complete passes as a trace; `experts` counts those of each layer."""
        whole = [one for one in self.passes if len(one.chosen) == len(experts)]
        top_k = whole[0].chosen[0].shape[1] if whole else 0
        return Trace(tuple(experts), top_k, origin, tuple(map(_forward_pass, whole)))


@dataclass(frozen=True)
class _Read:
    made: tuple[Prediction, ...]
    flat: Tensor | None = None

    def read(self, flat: Tensor | None = None) -> tuple[Prediction, ...]:
        return self.made


def _forward_pass(one: RecordedPass) -> ForwardPass:
    tokens = len(one.tokens)
    steps = []
    for chosen, guesses in zip(one.chosen, one.guesses, strict=True):
        experts, counts = chosen.unique(return_counts=True)  # type: ignore[no-untyped-call]
        demands = dict(zip(experts.tolist(), counts.tolist(), strict=True))
        steps.append(LayerStep(demands, guesses, recency_of([chosen]) if tokens > 1 else None))
    return ForwardPass(tokens, tuple(steps), one.from_tokens, span=tokens)


def computing_in_place(
    layers: Sequence[MoeLayer],
    store: ExpertStore,
    launch: Callable[[int, Tensor, Tensor, Tensor], object],
) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Return a function that runs a layer's experts where they lie in host memory.

    For recording and measuring without a card: nothing is moved and nothing is charged. `launch`
    is called first, with what the executor would give a predictor.
    """

    crossing = HostDevice()

    def run(layer: int, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        launch(layer, hidden, top_k_index, top_k_weights)
        math = layers[layer].math.reading(layers[layer].format)
        part = RoutedTokens(hidden, top_k_index, top_k_weights)
        (rows,), _ = open_rows(math, crossing, [part])
        for expert in rows.demands:
            slab = store.bytes_of(ExpertId(layer, expert))
            rows.compute(expert, views(slab, layers[layer].format))
        return rows.combined()

    return run
