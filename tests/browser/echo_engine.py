"""A fake engine that answers with what it was asked, thinks it too, and fails with it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from runtime.core import Delta, Finished, GenerationChunk, Message, SamplingParams
from runtime.errors import RequestError
from tests.fake_engine import FakeEngine


class EchoEngine(FakeEngine):
    """Text after `!fail` becomes the error of the answer; all other text is the answer."""

    def generate(
        self, conversation_id: str, messages: Sequence[Message], params: SamplingParams
    ) -> Iterator[GenerationChunk]:
        text = messages[-1].content
        if text.startswith("!fail"):
            raise RequestError(text.removeprefix("!fail"), text.removeprefix("!fail"))
        return self._echo(text)

    def _echo(self, text: str) -> Iterator[GenerationChunk]:
        for start in range(0, len(text), 400):
            yield Delta("reasoning", text[start : start + 400])
        for start in range(0, len(text), 400):
            yield Delta("answer", text[start : start + 400])
        yield Finished("stop", self._stats(1, 1, 0.01, 60.0))
