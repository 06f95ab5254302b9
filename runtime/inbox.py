"""What the engine process has been asked to do and has not done yet."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from runtime.core import LoadRequest, Message, SamplingParams
from runtime.errors import BusyError, ProtocolError
from runtime.wire import Frame, record_from_json

MAX_WAITING = 8


@dataclass(frozen=True)
class Job:
    """A generation that waits for its turn or runs."""

    request_id: int
    conversation_id: str
    messages: tuple[Message, ...]
    params: SamplingParams


class Inbox:
    """What the reader thread leaves for the main thread. Everything is under one condition."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._load: tuple[int, LoadRequest | None] | None = None
        self._newest_load = 0
        self._policy: str | None = None
        self._stopped: set[int] = set()
        self._running: int | None = None

    def add(self, job: Job) -> None:
        """Queue a generation.

        Raises:
            BusyError: too many wait already.
        """
        with self._changed:
            if len(self._jobs) >= MAX_WAITING:
                raise BusyError(
                    f"{MAX_WAITING} requests are waiting already.", "Try again in a moment."
                )
            self._jobs.append(job)
            self._changed.notify()

    def stop(self, request_id: int) -> None:
        """End a generation, whether it runs or waits."""
        with self._changed:
            known = [job.request_id for job in self._jobs]
            if request_id == self._running or request_id in known:
                self._stopped.add(request_id)

    def load(self, number: int, request: LoadRequest | None) -> None:
        """Ask for another model in place of the one being loaded; None only cancels.

        A number lower than one seen before is out of date and ignored.
        """
        with self._changed:
            if number <= self._newest_load:
                return
            self._newest_load = number
            self._load = (number, request)
            self._changed.notify()

    def set_policy(self, policy: str) -> None:
        with self._changed:
            self._policy = policy
            self._changed.notify()

    def take(self) -> tuple[int, LoadRequest | None] | Job | str:
        """Wait for the next thing to do: a numbered load first, a policy, then the oldest job."""
        with self._changed:
            self._running = None
            self._stopped &= {job.request_id for job in self._jobs}
            self._changed.wait_for(lambda: self._load or self._policy is not None or self._jobs)
            if self._load is not None:
                load, self._load = self._load, None
                return load
            if self._policy is not None:
                policy, self._policy = self._policy, None
                return policy
            job = self._jobs.popleft()
            self._running = job.request_id
            return job

    def take_policy(self) -> str | None:
        """Return the policy that was asked for since the last look."""
        if self._policy is None:  # read without the lock: this is asked at every token
            return None
        with self._changed:
            policy, self._policy = self._policy, None
            return policy

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
        inbox.set_policy(str(frame.get("policy")))
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
