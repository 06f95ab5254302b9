"""What the engine process has been asked to do and has not done yet."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from runtime.core import LoadRequest, Message, SamplingParams
from runtime.errors import BusyError, ProtocolError
from runtime.sequences import MAX_TOGETHER
from runtime.wire import Frame, record_from_json

MAX_WAITING = 8


@dataclass(frozen=True)
class Job:
    """A generation that waits for its turn or runs."""

    request_id: int
    conversation_id: str
    messages: tuple[Message, ...]
    params: SamplingParams


@dataclass(frozen=True)
class Load:
    """Another model is wanted in place of the one being loaded; None only cancels."""

    number: int
    request: LoadRequest | None


@dataclass(frozen=True)
class Change:
    """Something about the loaded engine is to be changed."""

    what: Literal["policy", "prediction", "reset_predictor"]
    value: str | bool = ""


Work = Job | Load | Change


class Inbox:
    """What the reader thread leaves for the main thread. Everything is under one condition."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._load: Load | None = None
        self._newest_load = 0
        self._changes: deque[Change] = deque()
        self._stopped: set[int] = set()
        self._running: set[int] = set()

    def add(self, job: Job) -> None:
        """Queue a generation.

        Raises:
            BusyError: too many wait already.
        """
        with self._changed:
            if len(self._jobs) + len(self._running) >= MAX_TOGETHER + MAX_WAITING:
                raise BusyError(
                    f"{MAX_WAITING} requests are waiting already.", "Try again in a moment."
                )
            self._jobs.append(job)
            self._changed.notify()

    def stop(self, request_id: int) -> None:
        """End a generation, whether it runs or waits."""
        with self._changed:
            if request_id in self._running or any(j.request_id == request_id for j in self._jobs):
                self._stopped.add(request_id)

    def ended(self, request_id: int) -> None:
        """Note that a generation is over."""
        with self._changed:
            self._running.discard(request_id)
            self._stopped.discard(request_id)

    def load(self, number: int, request: LoadRequest | None) -> None:
        """Ask for another model in place of the one being loaded; None only cancels.

        A number lower than one seen before is out of date and ignored.
        """
        with self._changed:
            if number <= self._newest_load:
                return
            self._newest_load = number
            self._load = Load(number, request)
            self._changed.notify()

    def change(self, change: Change) -> None:
        """Ask for a change of the loaded engine."""
        with self._changed:
            self._changes.append(change)
            self._changed.notify()

    def take(self, *, wait: bool, limit_s: float | None = None) -> Work | None:
        """Return the next thing to do: a load first, then changes, then the oldest job.

        A load comes once nothing runs, and no job is begun before it. None if there is nothing
        now; with `wait` something is waited for, about `limit_s` at most.
        """
        with self._changed:
            work = self._next()
            while work is None and wait:
                wait = self._changed.wait(limit_s)
                work = self._next()
            return work

    def _next(self) -> Work | None:
        if self._load is not None and not self._running:
            load, self._load = self._load, None
            return load
        if self._changes:
            return self._changes.popleft()
        if self._jobs and self._load is None:
            job = self._jobs.popleft()
            self._running.add(job.request_id)
            return job
        return None

    def is_stopped(self, request_id: int) -> bool:
        return request_id in self._stopped

    def watch_loads(self) -> Callable[[], bool]:
        """Return a question: has a load been asked for or cancelled since now?"""
        newest = self._newest_load
        return lambda: self._newest_load != newest


def take_frame(frame: Frame, inbox: Inbox) -> None:
    """Put what a frame of the app asks for into the inbox.

    Raises:
        BusyError: it is a generation and too many wait already.
        ProtocolError: the frame makes no sense.
    """
    op = frame["op"]
    if op == "generate":
        inbox.add(_job(frame))
    elif op == "stop":
        inbox.stop(_number(frame.get("id")))
    elif op == "load":
        inbox.load(
            _number(frame.get("number")), record_from_json(LoadRequest, frame.get("request"))
        )
    elif op == "cancel_load":
        inbox.load(_number(frame.get("number")), None)
    elif op == "policy":
        inbox.change(Change("policy", str(frame.get("policy"))))
    elif op == "prediction":
        inbox.change(Change("prediction", _switch(frame.get("on"))))
    elif op == "reset_predictor":
        inbox.change(Change("reset_predictor"))
    else:
        raise ProtocolError(f"There is no operation {op!r}.")


def _job(frame: Frame) -> Job:
    messages = frame.get("messages")
    if not isinstance(messages, list):
        raise ProtocolError("A generation needs its messages.")
    return Job(
        _number(frame.get("id")),
        str(frame.get("conversation_id")),
        tuple(record_from_json(Message, message) for message in messages),
        record_from_json(SamplingParams, frame.get("params")),
    )


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise ProtocolError("A request id must be a number.")
    return value


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ProtocolError("A switch is on or off.")
    return value
