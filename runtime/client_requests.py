"""The generations the app waits for, and how often a process may be started again."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict

from runtime.core import Finished, GenerationChunk, Message, SamplingParams
from runtime.errors import PreScopeError
from runtime.wire import Frame


class Front:
    """Delivered when a request's turn has come."""


Item = GenerationChunk | PreScopeError | Front
Box = queue.SimpleQueue[Item]


class Requests:
    """Boxes by request id; chunks for a box that is gone are dropped. Any thread may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[int, Box] = {}
        self._last_id = 0

    def __len__(self) -> int:
        return len(self._boxes)

    def open(self) -> tuple[int, Box]:
        """Return a fresh id and the box its items will be put into."""
        with self._lock:
            self._last_id += 1
            box: Box = queue.SimpleQueue()
            self._boxes[self._last_id] = box
            return self._last_id, box

    def deliver(self, request_id: object, item: Item) -> None:
        """Put an item into its box; the last one ends the request."""
        if not isinstance(request_id, int):
            return
        last = isinstance(item, (Finished, PreScopeError))
        with self._lock:
            box = self._boxes.pop(request_id, None) if last else self._boxes.get(request_id)
        if box is not None:
            box.put(item)

    def fail_all(self, error: Callable[[], PreScopeError]) -> None:
        """End every request with an error of its own."""
        with self._lock:
            boxes, self._boxes = list(self._boxes.values()), {}
        for box in boxes:
            box.put(error())


def generate_frame(
    request_id: int, conversation_id: str, messages: Sequence[Message], params: SamplingParams
) -> Frame:
    """Return the frame that asks the engine process for an answer."""
    return {
        "op": "generate",
        "id": request_id,
        "conversation_id": conversation_id,
        "messages": [asdict(message) for message in messages],
        "params": asdict(params),
    }


class RestartLimit:
    """At most `most` starts after the first within `window_s`, each after its own delay."""

    def __init__(self, most: int, window_s: float, delays_s: tuple[float, ...]) -> None:
        self._most = most
        self._window_s = window_s
        self._delays_s = delays_s
        self._starts: deque[float] = deque()

    def delay_s(self) -> float | None:
        """Return how long to wait before the next start; None if there must be none."""
        now_s = time.monotonic()
        while self._starts and now_s - self._starts[0] > self._window_s:
            self._starts.popleft()
        if len(self._starts) > self._most:
            return None
        return self._delays_s[len(self._starts) - 1] if self._starts else 0.0

    def started(self) -> None:
        """Note a start."""
        self._starts.append(time.monotonic())

    def forget(self) -> None:
        """Begin anew: a person asked for it."""
        self._starts.clear()
