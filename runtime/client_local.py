"""The engine subprocess as the app sees it: started, followed, restarted, closed.

Never imports torch. No thread waits by polling: every wait is for a frame, a condition or a
deadline.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from runtime.client_answer import Answer
from runtime.client_requests import Box, Front, Requests, RestartLimit, generate_frame
from runtime.core import (
    POLICIES,
    Accepted,
    EngineState,
    EngineStatus,
    Finished,
    GenerationChunk,
    LoadProgress,
    LoadRequest,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.engine_process import EngineProcess, died
from runtime.errors import PreScopeError, ProtocolError, RequestError, error_from_json
from runtime.wire import PROTOCOL_VERSION, Frame, chunk_from_json, record_from_json

MAX_RESTARTS = 3
RESTART_WINDOW_S = 600.0
RESTART_DELAYS_S = (0.0, 1.0, 4.0)


class LocalEngine:
    """An `EngineClient` in front of `python -m runtime.host`.

    The process starts with the object and is restarted when it dies, at most three times in ten
    minutes, with the model that last answered. One thread owns the process from its start to its
    end; `close` leaves neither behind. If the app itself is killed, the process sees the end of
    its pipe and goes.
    """

    def __init__(
        self,
        data_dir: Path | None,
        host_arguments: Sequence[str] = (),
        *,
        hello_deadline_s: float = 60.0,
        accept_deadline_s: float = 30.0,
    ) -> None:
        """Start the engine process; its log goes to `data_dir`/logs.

        `accept_deadline_s` is how long the process may take from a request's turn to its
        `Accepted`; then the template or the engine hangs and the process is replaced.
        """
        self._log_dir = data_dir / "logs" if data_dir is not None else None
        self._host_arguments = tuple(host_arguments)
        self._hello_deadline_s = hello_deadline_s
        self._accept_deadline_s = accept_deadline_s
        self._changed = threading.Condition()
        self._closed = False
        self._process: EngineProcess | None = None
        self._requests = Requests()
        self._limit = RestartLimit(MAX_RESTARTS, RESTART_WINDOW_S, RESTART_DELAYS_S)
        self._last_load = 0
        self._asked: LoadRequest | None = None  # the newest load, until it is ready or refused
        self._answering: LoadRequest | None = None  # the model that answers, for a restart
        self._greeted = False
        self._revive = False
        self._restarts = 0
        self._notice = ""  # why the engine was restarted, until the next load
        self._status = EngineStatus("starting")
        self._snapshot: TelemetrySnapshot | None = None
        self._owner = threading.Thread(target=self._own_process, name="engine-client", daemon=True)
        self._owner.start()

    # What the app asks (`EngineClient`).

    def status(self) -> EngineStatus:
        return self._status

    def snapshot(self) -> TelemetrySnapshot | None:
        return self._snapshot

    @property
    def pid(self) -> int | None:
        """The process id of the engine, or None between two lives."""
        process = self._process
        return process.pid if process is not None else None

    def load(self, request: LoadRequest) -> None:
        if Path(request.model).is_dir():
            request = replace(request, model=str(Path(request.model).resolve()))
        with self._changed:
            self._asked = request
            self._notice = ""
            self._revive = True
            self._status = EngineStatus(
                "loading",
                self._status.model,
                request.model,
                LoadProgress("Waiting for the engine"),
                restarts=self._restarts,
            )
            self._changed.notify_all()
            process, frame = self._process, self._load_frame(request)
        if process is not None:
            process.send(frame)

    def cancel_load(self) -> None:
        with self._changed:
            self._asked = None
            self._last_load += 1
            process, number = self._process, self._last_load
        if process is not None:
            process.send({"op": "cancel_load", "number": number})

    def set_policy(self, policy: str) -> None:
        with self._changed:
            known = next((name for name in POLICIES if name == policy), None)
            if known is not None and self._answering is not None:
                self._answering = replace(self._answering, policy=known)
            process = self._process
        if process is not None:
            process.send({"op": "policy", "policy": policy})

    def set_prediction(self, on: bool) -> None:
        process = self._process
        if process is not None:
            process.send({"op": "prediction", "on": on})

    def reset_predictor(self) -> None:
        process = self._process
        if process is not None:
            process.send({"op": "reset_predictor"})

    def generate(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        params: SamplingParams,
    ) -> Iterator[GenerationChunk]:
        process, request_id, box = self._enrol()
        frame = generate_frame(request_id, conversation_id, messages, params)
        return Answer(self._chunks(process, frame, box), process, request_id)

    def _chunks(
        self, process: EngineProcess, frame: Frame, box: Box
    ) -> Generator[GenerationChunk, None, None]:
        """Yield what comes for one request; the engine is killed if it takes too long to begin."""
        finished = False
        try:
            process.send(frame)
            deadline_s: float | None = None
            while not finished:
                try:
                    item = box.get(timeout=deadline_s)
                except queue.Empty:
                    deadline_s = None
                    process.kill(
                        f"the chat template of {self._status.model} or the engine did not "
                        f"finish within {self._accept_deadline_s:.0f} s"
                    )
                    continue
                if isinstance(item, Front):
                    deadline_s = self._accept_deadline_s
                    continue
                if isinstance(item, PreScopeError):
                    finished = True
                    raise item
                if isinstance(item, Accepted):
                    deadline_s = None
                finished = isinstance(item, Finished)
                yield item
        except ProtocolError as failure:
            raise RequestError(failure.message, failure.next_step) from failure
        finally:
            if not finished:
                process.send({"op": "stop", "id": frame["id"]})

    def close(self) -> None:
        with self._changed:
            self._closed = True
            if self._process is not None:
                self._process.kill("PreScope is closing")
            self._changed.notify_all()
        self._owner.join()

    # Requests.

    def _enrol(self) -> tuple[EngineProcess, int, Box]:
        """Open a request on the running process; under the lock, so that its end reaches it."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._process is not None or self._status.state == "dead",
                self._hello_deadline_s,
            )
            if self._process is None:
                raise died(self._notice or "it is not running", self._log_dir)
            return self._process, *self._requests.open()

    # The owner thread.

    def _own_process(self) -> None:
        """Start the process, follow it to its end, and start it again."""
        while self._may_start():
            try:
                process = EngineProcess(self._host_arguments, self._log_dir, self._hello_deadline_s)
            except OSError as failure:
                self._ended(f"it could not be started: {failure}")
                continue
            self._began(process)
            try:
                for frame in process.frames():
                    self._take(process, frame)
            except ProtocolError as failure:
                process.kill(f"it sent something unreadable ({failure.message})")
            self._ended(process.reap())

    def _may_start(self) -> bool:
        """Wait until the process may be started; False once the client is closed."""
        with self._changed:
            delay_s = self._limit.delay_s()
            if delay_s is None:
                self._status = replace(
                    self._status,
                    state="dead",
                    next_step="Load a model to try again, with a smaller cache or another model.",
                )
                self._revive = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._revive)
                self._limit.forget()
            elif delay_s > 0:
                self._changed.wait_for(lambda: self._closed, delay_s)
            if self._closed:
                return False
            self._limit.started()
            return True

    def _began(self, process: EngineProcess) -> None:
        with self._changed:
            self._process, self._greeted = process, False
            if self._closed:
                process.kill("PreScope is closing")
            request = self._asked or self._answering
            frame = self._load_frame(request) if request is not None else None
            self._changed.notify_all()
        if frame is not None:
            process.send(frame)

    def _load_frame(self, request: LoadRequest) -> Frame:
        """Number a load: the host takes only newer ones, and its status echoes the number."""
        self._last_load += 1
        return {"op": "load", "number": self._last_load, "request": asdict(request)}

    def _take(self, process: EngineProcess, frame: Frame) -> None:
        op = frame["op"]
        if op == "chunk":
            self._requests.deliver(frame.get("id"), chunk_from_json(frame.get("chunk")))
        elif op == "snapshot":
            self._snapshot = record_from_json(TelemetrySnapshot, frame.get("value"))
        elif op == "status":
            self._take_status(frame)
        elif op == "front":
            self._requests.deliver(frame.get("id"), Front())
        elif op == "failed":
            error = frame.get("error")
            failure = error_from_json(error if isinstance(error, dict) else {})
            self._requests.deliver(frame.get("id"), failure)
        elif op == "hello":
            if frame.get("protocol") != PROTOCOL_VERSION:
                raise ProtocolError(f"protocol {frame.get('protocol')}, not {PROTOCOL_VERSION}")
            process.greeted()
            with self._changed:
                self._greeted = True
                if self._asked is None and self._answering is None:
                    self._status = EngineStatus(
                        "empty", notice=self._notice, restarts=self._restarts
                    )
        else:
            raise ProtocolError(f"There is no operation {op!r}.")

    def _take_status(self, frame: Frame) -> None:
        status = record_from_json(EngineStatus, frame.get("value"))
        with self._changed:
            if frame.get("load") != self._last_load:
                return  # it speaks of a load that a newer one has replaced
            if status.state in ("ready", "empty"):
                if self._asked is not None and status.state == "ready" and not status.notice:
                    self._answering = self._asked
                self._asked = None
            self._status = replace(
                status, notice=status.notice or self._notice, restarts=self._restarts
            )

    def _ended(self, reason: str) -> None:
        with self._changed:
            self._process = None
            self._restarts += 1
            what = "The engine stopped"
            if self._asked is not None and self._greeted:
                # It may well be this model that ended the engine: do not load it again unasked.
                what += f" while loading {self._asked.model}"
                self._asked = None
            self._notice = f"{what}: {reason}."
            state: EngineState = "dead" if self._closed else "restarting"
            self._status = EngineStatus(state, notice=self._notice, restarts=self._restarts)
            if self._snapshot is not None:
                self._snapshot = replace(self._snapshot, generating=False)
            self._changed.notify_all()
            self._requests.fail_all(lambda: died(reason, self._log_dir))
