"""One request on its way to an answer: what it computes next, what becomes of it, how it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch

from runtime.core import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    GenerationChunk,
    GenerationStats,
    SamplingParams,
)
from runtime.prompts import Prompt, Tokenizer
from runtime.sampler import Sampler
from runtime.sequences import Conversation
from runtime.telemetry import Timing
from runtime.text_stream import Piece, TextStream


class Generation:
    """A request from its acceptance to its end. The engine thread owns it.

    Chunks wait in it until `take` fetches them. `conversation` is None until it has its place
    among those that are computed together. Once `over`, the last chunk was `Finished`, or
    `failure` says why there was none.
    """

    def __init__(
        self,
        conversation_id: str,
        prompt: Prompt,
        params: SamplingParams,
        room: int,
        stop: Callable[[], bool],
        tokenizer: Tokenizer,
        timing: Timing,
    ) -> None:
        """`room` is how many tokens the answer may have."""
        self.conversation_id = conversation_id
        self.prompt_ids = prompt.ids
        self.most_tokens = len(prompt.ids) + room
        self.stop = stop
        self.timing = timing
        self.conversation: Conversation | None = None
        self.failure: Exception | None = None
        self.over = False
        self.passes = 0
        self._room = room
        self._sampler = Sampler(params, list(prompt.ids))
        self._text = TextStream(tokenizer, prompt.opens_reasoning)
        self._chunks: deque[GenerationChunk] = deque()
        self._pending: list[int] = []
        self._last_token = -1

    @property
    def prefilling(self) -> bool:
        """Whether tokens of the prompt are still to be computed."""
        return self.timing.new_tokens == 0

    def take(self) -> list[GenerationChunk]:
        """Return the chunks since the last call."""
        chunks = list(self._chunks)
        self._chunks.clear()
        return chunks

    def accept(self, reused_tokens: int) -> None:
        """Say that the request is valid."""
        self._chunks.append(Accepted(len(self.prompt_ids), reused_tokens))

    def next_ids(self, chunk_tokens: int) -> Sequence[int]:
        """Return what its next pass computes: a chunk of the prompt, or the last token."""
        if not self.prefilling:
            return (self._last_token,)
        assert self.conversation is not None
        begin = len(self.conversation.ids)
        whole = not self.conversation.cache.continues
        return self.prompt_ids[begin : None if whole else begin + chunk_tokens]

    def note_pass(self) -> bool:
        """Note that a pass of it was computed; return whether its logits are those of a new token.

        They are not while more of the prompt is to come.
        """
        self.passes += 1
        return self.conversation is not None and len(self.conversation.ids) >= len(self.prompt_ids)

    def advance(
        self, logits: torch.Tensor, end_ids: frozenset[int], now_s: float
    ) -> FinishReason | None:
        """Choose the token that follows `logits` (vocabulary,); return why it is the last one.

        Raises:
            ModelError: the model produced invalid numbers.
        """
        token = self._sampler.next_token(logits)
        self.timing.token(now_s)
        self._last_token = token
        self._pending.append(token)
        self._say(self._text.push(token))
        if token in end_ids:
            return "stop"
        return "length" if self.timing.new_tokens == self._room else None

    def finish(self, reason: FinishReason, stats: GenerationStats) -> None:
        """End the answer with what was held back of it, and its figures."""
        self._say(self._text.finish())
        if self._pending:
            self._chunks.append(Delta("answer", "", tuple(self._pending)))
        self._chunks.append(Finished(reason, stats))
        self.over = True

    def fail(self, failure: Exception) -> None:
        """End without a `Finished`."""
        self.failure = failure
        self.over = True

    def _say(self, pieces: Sequence[Piece]) -> None:
        """Turn pieces of text into deltas; the first one carries the ids that waited for it."""
        for kind, text in pieces:
            self._chunks.append(Delta(kind, text, tuple(self._pending)))
            self._pending.clear()
