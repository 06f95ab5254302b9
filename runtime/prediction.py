"""What the executor asks of a predictor of expert activation; `runtime.predictor` is one.

A prediction is a hint: it may move bytes earlier and protect experts from eviction, and it never
changes which experts are computed.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from runtime.trace import Prediction


class Pending(Protocol):
    """Predictions that the device may still be computing."""

    @property
    def flat(self) -> Tensor | None:
        """What the device computes for them, to be read along with the routing; None: nothing."""
        ...

    def read(self, flat: Tensor | None = None) -> tuple[Prediction, ...]:
        """Return them, at most one per (layer, distance); `flat` is what the host read of it, and
        without that they are waited for."""
        ...


class ExpertPredictor(Protocol):
    """Guesses the experts of the next layers from this layer's state. Engine thread only.

    The true choices that `launch` is given are the labels of the guesses made before.
    """

    weight_bytes: int
    """Bytes of weights read for one layer's guesses: its cost on a device bound by memory."""

    def begin_pass(self, token_ids: Tensor) -> Pending:
        """Guess the first two layers from the pass's tokens; `token_ids` is (tokens,)."""
        ...

    def launch(
        self, layer: int, router_input: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Pending:
        """Guess layers `layer` + 1 and + 2 from what the router of `layer` saw and chose.

        Args:
            layer: index of the MoE layer just routed.
            router_input: (tokens, hidden), after the layer's own norm.
            top_k_index: (tokens, k), its experts.
            top_k_weights: (tokens, k).
        """
        ...

    def improve(self, budget_s: float) -> None:
        """Learn from what was seen for up to `budget_s`; return at once if there is nothing."""
        ...

    def reset(self) -> None:
        """Forget what was learned on this machine, on disk as well."""
        ...
