"""One answer on its way from the engine process to whoever asked."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from runtime.core import Finished, GenerationChunk
from runtime.engine_process import EngineProcess


class Answer(Iterator[GenerationChunk]):
    """One generation as it comes. Read by one thread; `close` may be called from any.

    After `close` the engine stops within one token and what is left to read is short: the deltas
    under way and a `Finished` with the figures so far.
    """

    def __init__(
        self,
        chunks: Generator[GenerationChunk, None, None],
        process: EngineProcess,
        request_id: int,
    ) -> None:
        self._chunks = chunks
        self._process = process
        self._request_id = request_id
        self._over = False

    def __next__(self) -> GenerationChunk:
        try:
            chunk = next(self._chunks)
        except BaseException:
            self._over = True
            raise
        self._over = isinstance(chunk, Finished)
        return chunk

    def close(self) -> None:
        """Stop the generation; safe to call twice and after its end."""
        if not self._over:
            self._process.send({"op": "stop", "id": self._request_id})
