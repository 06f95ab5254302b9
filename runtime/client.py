"""The one seam between the app and an engine.

`EngineClient` is what the app may ask. `LocalEngine` is the engine subprocess on this machine;
later a remote one may stand in front of any OpenAI-compatible server. This module never imports
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from runtime.client_local import LocalEngine
from runtime.core import (
    EngineStatus,
    GenerationChunk,
    LoadRequest,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)

__all__ = ["EngineClient", "LocalEngine"]


class EngineClient(Protocol):
    """What the app may ask of an engine. Every method may be called from any thread.

    Errors are `runtime.errors.PreScopeError`s. Whoever holds a client calls `close` once.
    """

    def status(self) -> EngineStatus:
        """Return the newest status without waiting."""
        ...

    def snapshot(self) -> TelemetrySnapshot | None:
        """Return the newest telemetry without waiting; None before the first model is loaded."""
        ...

    def load(self, request: LoadRequest) -> None:
        """Start loading a model and return at once; `status` tells how it goes.

        A load under way is cancelled first. If the load fails, the previous model keeps
        answering and `status().notice` and `next_step` say why.
        """
        ...

    def cancel_load(self) -> None:
        """Give up the load under way, if any; the previous model stays."""
        ...

    def generate(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        params: SamplingParams,
    ) -> Iterator[GenerationChunk]:
        """Answer the whole message list: `Accepted`, then `Delta`s, then one `Finished`.

        `conversation_id` lets the engine reuse the KV of the same conversation. One thread reads
        the iterator; its `close`, which any thread may call, stops the generation within one
        token, and what is left to read ends with `Finished` and the figures so far.

        Raises:
            RequestError: before the first chunk, for a prompt that cannot be answered.
            BusyError: more requests are waiting than the engine holds.
            EngineDiedError: the engine ended; the deltas so far are the text so far.
        """
        ...

    def set_policy(self, policy: str) -> None:
        """Change the placement policy from the next token on."""
        ...

    def set_prediction(self, on: bool) -> None:
        """Let experts be copied ahead of their layer, or not, from the next token on.

        An engine process begins with it on, whatever it was told before it ended.
        """
        ...

    def reset_predictor(self) -> None:
        """Forget what the predictor of the loaded model learned here; the shipped start stays."""
        ...

    def close(self) -> None:
        """End the engine and wait for it; safe to call twice."""
        ...
