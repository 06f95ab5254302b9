"""The live stream: one producer for all pages, latest value only, silent while nothing moves.

Nothing runs while no page listens. A page that reads slowly skips values; nothing piles up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import StreamingResponse

from app.panel import limit
from app.prediction import PredictionView, PredictionWatch
from runtime.client import EngineClient
from runtime.core import EngineStatus, TelemetrySnapshot

TICK_S = 0.25
KEEP_ALIVE_S = 5.0


class LiveFeed:
    """Owns the producer task; used from the server's event loop, except `stop`."""

    def __init__(self, engine: EngineClient, prediction: PredictionWatch) -> None:
        self._engine = engine
        self._prediction = prediction
        self._listeners: set[asyncio.Event] = set()
        self._event = b""
        self._seen: tuple[EngineStatus, TelemetrySnapshot | None, PredictionView] | None = None
        self._producer: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = False
        self.serialised = 0

    async def respond(self, request: Request) -> StreamingResponse:
        """Answer `GET /live`."""
        return StreamingResponse(
            self._stream(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    def stop(self) -> None:
        """End every stream, now and later; any thread."""
        self._stopped = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for news in self._listeners:
            news.set()

    async def _stream(self) -> AsyncGenerator[bytes, None]:
        news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._listeners.add(news)
        try:
            self._produce()
            if self._producer is None:
                self._producer = asyncio.create_task(self._run())
            yield self._event
            while not self._stopped:
                try:
                    await asyncio.wait_for(news.wait(), KEEP_ALIVE_S)
                except asyncio.TimeoutError:
                    yield b": still here\n\n"
                    continue
                news.clear()
                if not self._stopped:
                    yield self._event
        finally:
            self._listeners.discard(news)

    async def _run(self) -> None:
        try:
            while self._listeners and not self._stopped:
                await asyncio.sleep(TICK_S)
                if self._produce():
                    self._wake()
        finally:
            self._producer = None

    def _produce(self) -> bool:
        """Serialise the engine's picture if it changed; return whether it did."""
        status, snapshot = self._engine.status(), self._engine.snapshot()
        seen = (status, snapshot, self._prediction.view(status, snapshot))
        if seen == self._seen:
            return False
        self._seen = seen
        self._event = b"data: " + payload(*seen).encode() + b"\n\n"
        self.serialised += 1
        return True


def payload(
    status: EngineStatus, snapshot: TelemetrySnapshot | None, prediction: PredictionView
) -> str:
    """Return the JSON of one event: `status`, `snapshot` or null, `prediction`, and what limits
    speed now."""
    return json.dumps(
        {
            "status": dataclasses.asdict(status),
            "snapshot": None if snapshot is None else _picture(snapshot),
            "prediction": dataclasses.asdict(prediction),
            "limit": dataclasses.asdict(limit(status, snapshot, prediction.on)),
        },
        separators=(",", ":"),
    )


def _picture(snapshot: TelemetrySnapshot) -> dict[str, Any]:
    """Return the snapshot with the waits of its layers in whole microseconds: a third as long."""
    record = dataclasses.asdict(snapshot)
    record["stall_s_by_layer"] = [round(stall_s, 6) for stall_s in snapshot.stall_s_by_layer]
    return record
