"""One answer being written: a pump reads the engine, the job keeps the text and saves it.

Two threads, so that neither a slow disk nor an engine stuck in a long prompt delays the other: the
pump only forwards chunks into the inbox, the job alone owns the text.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from app.database import HistoryError
from app.history import History, MessageState, StoredMessage
from runtime.core import Accepted, Delta, Finished, FinishReason, GenerationChunk
from runtime.errors import CancelledError, PreScopeError

LiveState = Literal["waiting", "reasoning", "answering"]
SAVE_EVERY_S = 1.0
STOP_GRACE_S = 0.4
_STATES: dict[FinishReason, MessageState] = {
    "stop": "complete",
    "length": "complete",
    "cancelled": "stopped",
    "error": "failed",
}
_log = logging.getLogger(__name__)
_Signal = Literal["stop", "suspend", "abandon", "end"]


@dataclass(frozen=True)
class LiveAnswer:
    """An answer being written, of so many `tokens`. `version` changes whenever anything else does.

    `started_s` is seconds since 1970. No two versions of one app run are equal. `notice` says why
    the text cannot be saved just now; it is kept and saved once that passes.
    """

    message_id: int
    reasoning: str
    text: str
    state: LiveState
    started_s: float
    version: int
    notice: str = ""
    tokens: int = 0


class Answer:
    """Owns one answer from its start to its last save.

    Every change goes out whole through `publish`; `live` is what was made of it, and belongs to
    the lock of whoever made this.
    """

    def __init__(
        self,
        *,
        history: History,
        message_id: int,
        settled: list[StoredMessage],
        open_stream: Callable[[], Iterator[GenerationChunk]],
        publish: Callable[[LiveAnswer], None],
        on_end: Callable[[], None],
    ) -> None:
        self.message_id = message_id
        self.settled = settled
        self.live = LiveAnswer(message_id, "", "", "waiting", time.time(), 0)
        self._history = history
        self._publish = publish
        self._on_end = on_end
        self._inbox: queue.SimpleQueue[GenerationChunk | PreScopeError | _Signal] = (
            queue.SimpleQueue()
        )
        self._pump = _Pump(open_stream, self._inbox)
        self._now = self.live
        self._job = threading.Thread(target=self._run, name=f"answer-{message_id}", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._job.start()

    def stop(self) -> None:
        """End soon and keep the text as stopped."""
        self._inbox.put("stop")

    def suspend(self) -> None:
        """End soon and leave the text partial: the app is closing."""
        self._inbox.put("suspend")

    def abandon(self) -> None:
        """End soon and save nothing more: the conversation is being deleted."""
        self._inbox.put("abandon")
        self._job.join(STOP_GRACE_S)

    def join(self, timeout_s: float) -> None:
        """Wait for the last save."""
        self._job.join(timeout_s)

    def _run(self) -> None:
        self._pump.start()
        try:
            ending = self._follow()
            self._pump.cancel()
            while ending is not None and not self._save(*ending) and self._may_try_again():
                pass
        finally:
            self._pump.cancel()
            self._on_end()

    def _follow(self) -> tuple[MessageState, dict[str, Any], str] | None:
        """Take what the pump brings until the end; return how to store it, None for not at all."""
        save_s, dirty, stop_s = time.monotonic() + SAVE_EVERY_S, False, float("inf")
        while True:
            now_s = time.monotonic()
            if now_s >= stop_s:
                return "stopped", {}, ""
            if dirty and now_s >= save_s:
                dirty = not self._save("partial", {}, "")
                save_s = time.monotonic() + SAVE_EVERY_S
            due_s = min(save_s if dirty else float("inf"), stop_s)
            try:
                item = self._inbox.get(timeout=None if due_s == float("inf") else due_s - now_s)
            except queue.Empty:
                continue
            if isinstance(item, Delta):
                self._append(item)
                dirty = True
            elif isinstance(item, Finished):
                stats = {**asdict(item.stats), "finish_reason": item.reason}
                state = "stopped" if stop_s < float("inf") else _STATES[item.reason]
                error = "The engine could not finish this answer." if state == "failed" else ""
                return state, stats, error
            elif isinstance(item, CancelledError) or (
                stop_s < float("inf") and (item == "end" or isinstance(item, PreScopeError))
            ):
                return "stopped", {}, ""
            elif isinstance(item, PreScopeError):
                return "failed", {}, f"{item.message} {item.next_step}".strip()
            elif item == "stop":
                stop_s = min(stop_s, time.monotonic() + STOP_GRACE_S)
                self._pump.cancel()
            elif item == "suspend":
                return "partial", {}, ""
            elif item == "abandon":
                return None
            elif item == "end":
                return "failed", {}, "The engine ended this answer without saying why."

    def _append(self, delta: Delta) -> None:
        now = replace(self._now, tokens=self._now.tokens + len(delta.token_ids))
        if delta.kind == "reasoning":
            self._tell(replace(now, reasoning=now.reasoning + delta.text, state="reasoning"))
        else:
            self._tell(replace(now, text=now.text + delta.text, state="answering"))

    def _tell(self, now: LiveAnswer) -> None:
        self._now = now
        self._publish(now)

    def _save(self, state: MessageState, stats: dict[str, Any], error: str) -> bool:
        now = self._now
        try:
            self._history.save_answer(self.message_id, now.text, now.reasoning, state, stats, error)
        except HistoryError as failure:
            _log.warning("answer %d is not saved: %s", self.message_id, failure.message)
            notice = f"Not saved yet: {failure.message} {failure.next_step}"
            self._tell(replace(now, notice=notice))
            return False
        if now.notice:
            self._tell(replace(now, notice=""))
        return True

    def _may_try_again(self) -> bool:
        """Wait until the next attempt to save; False when the answer has to end now."""
        deadline = time.monotonic() + SAVE_EVERY_S
        while (left_s := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                if self._inbox.get(timeout=left_s) in ("suspend", "abandon"):
                    return False
        return True


class _Pump:
    """Reads one generation to its end on a thread of its own and closes it when told to."""

    def __init__(
        self,
        open_stream: Callable[[], Iterator[GenerationChunk]],
        inbox: queue.SimpleQueue[GenerationChunk | PreScopeError | _Signal],
    ) -> None:
        self._open_stream = open_stream
        self._inbox = inbox
        self._cancelled = threading.Event()
        self._stream: Iterator[GenerationChunk] | None = None
        self._thread = threading.Thread(target=self._run, name="answer-pump", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """Close the generation: at once where it allows that, else with its next chunk."""
        self._cancelled.set()
        if self._stream is not None and not isinstance(self._stream, types.GeneratorType):
            _close(self._stream)

    def _run(self) -> None:
        try:
            stream = self._stream = self._open_stream()
            if self._cancelled.is_set():
                _close(stream)
            for chunk in stream:
                if not isinstance(chunk, Accepted):
                    self._inbox.put(chunk)
                if self._cancelled.is_set() and isinstance(stream, types.GeneratorType):
                    stream.close()
                    break
        except PreScopeError as error:
            self._inbox.put(error)
        finally:
            self._inbox.put("end")


def _close(stream: Iterator[GenerationChunk]) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        with contextlib.suppress(PreScopeError):
            close()
