"""The engine process: `python -m runtime.host`, one model behind a pipe.

Frames come in on what was standard input and leave on what was standard output; both are moved to
private descriptors first, so that a stray print of any library goes to the log instead. The main
thread loads models and generates for all requests together, taking new ones between two tokens; a
reader thread takes frames and ends the process at once when the app is gone. torch is imported
with the first model, long after the app has been greeted.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, NoReturn, Protocol

from runtime.core import (
    EngineStatus,
    GenerationChunk,
    HardwareProfile,
    LoadProgress,
    LoadRequest,
    Message,
    SamplingParams,
    TelemetrySnapshot,
)
from runtime.errors import (
    BusyError,
    CancelledError,
    MemoryPlanError,
    PreScopeError,
    ProtocolError,
    RequestError,
    TransferError,
)
from runtime.inbox import Change, Inbox, Job, Load, take_frame
from runtime.private_streams import (
    EXIT_APP_GONE,
    EXIT_DEVICE_LOST,
    EXIT_PROTOCOL,
    Pipe,
    leave,
    take_standard_streams,
    volunteer_for_oom_kill,
)
from runtime.wire import PROTOCOL_VERSION, chunk_to_json, read_frames

PROGRESS_EVERY_S = 0.2
IDLE_SLICE_S = 0.05
IDLE_LOOK_S = 2.0

log = logging.getLogger("prescope.host")


class HostedGeneration(Protocol):
    """What the host asks of a request under way; `runtime.engine_generation.Generation` is one."""

    @property
    def over(self) -> bool: ...

    @property
    def failure(self) -> Exception | None: ...

    def take(self) -> Sequence[GenerationChunk]: ...


class HostedEngine(Protocol):
    """What the host asks of a loaded engine; `runtime.engine.Engine` is one."""

    @property
    def name(self) -> str: ...

    @property
    def profile(self) -> HardwareProfile: ...

    @property
    def remarks(self) -> tuple[str, ...]: ...

    def submit(
        self,
        conversation_id: str,
        messages: Sequence[Message],
        params: SamplingParams,
        stop: Callable[[], bool],
    ) -> HostedGeneration: ...

    def step(self) -> None: ...

    def idle(self, budget_s: float) -> bool: ...

    def watch_ram(self) -> None: ...

    def set_policy(self, policy: str) -> None: ...

    def set_prediction(self, on: bool) -> None: ...

    def reset_predictor(self) -> None: ...

    def device_works(self) -> bool: ...

    def close(self) -> None: ...


class Assemble(Protocol):
    """Builds an engine; asks `cancelled` often and then raises CancelledError.

    `beside` says that another engine keeps its memory meanwhile: where both do not fit whole it
    raises MemoryPlanError instead of making do with less.
    """

    def __call__(
        self,
        request: LoadRequest,
        *,
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
        publish: Callable[[TelemetrySnapshot], None],
        beside: bool,
    ) -> HostedEngine: ...


class Host:
    """The main thread's work: one engine, its loads, and its generations token by token."""

    def __init__(self, pipe: Pipe, inbox: Inbox, assemble: Callable[[], Assemble]) -> None:
        self._pipe = pipe
        self._inbox = inbox
        self._assemble = assemble
        self._engine: HostedEngine | None = None
        self._loaded: LoadRequest | None = None
        self._status = EngineStatus("empty")
        self._load_number = 0
        self._progress_due_s = 0.0
        self._answers: list[tuple[Job, HostedGeneration]] = []
        self._may_learn = False

    def run(self) -> NoReturn:
        """Serve until the process ends."""
        while True:
            work = self._inbox.take(
                wait=not self._answers and not self._may_learn,
                limit_s=None if self._engine is None else IDLE_LOOK_S,
            )
            if isinstance(work, Job):
                self._begin(work)
            elif isinstance(work, Change):
                self._change(work)
            elif isinstance(work, Load):
                self._load_number = work.number
                if work.request is None:
                    self._show()
                else:
                    self._load(work.request)
            elif self._answers:
                self._advance()
            elif self._may_learn:
                self._may_learn = self._engine is not None and self._engine.idle(IDLE_SLICE_S)
            elif self._engine is not None:
                self._engine.watch_ram()

    def _load(self, request: LoadRequest) -> None:
        from runtime.hardware_memory import give_back_memory

        cancelled = self._inbox.watch_loads()
        self._show(state="loading", loading=request.model, progress=LoadProgress("Starting"))
        self._progress_due_s = 0.0
        previous = self._loaded
        engine: HostedEngine | None = None
        notice = next_step = ""
        try:
            engine = self._build_in_turn(request, cancelled)
        except CancelledError:
            log.info("load cancelled")
        except PreScopeError as failure:
            log.warning("load failed: %s", failure.message)
            notice, next_step = failure.message, failure.next_step
        except Exception as failure:
            # The edge of the process: whatever a hostile model makes a library raise, the
            # previous model must keep answering.
            log.exception("load failed")
            reason = f"{request.model} could not be loaded: {type(failure).__name__}: {failure}"
            notice, next_step = reason[:500], "See the engine's log."
        if engine is None:
            # Only out here is the failed load's memory free: the exception held its frames.
            give_back_memory()
            self._keep_previous(previous, notice, next_step)
            return
        self._unload()
        self._engine, self._loaded = engine, request
        self._status = EngineStatus("ready", engine.name, remarks=engine.remarks)
        self._show()

    def _build_in_turn(self, request: LoadRequest, cancelled: Callable[[], bool]) -> HostedEngine:
        """Build beside the old engine if both fit, else in its place."""
        from runtime.hardware_memory import give_back_memory

        # On a card a plan made beside the old model is too small for the new one.
        if self._engine is not None and self._engine.profile.device_kind != "cuda":
            try:
                return self._build(request, cancelled, beside=True)
            except (MemoryPlanError, MemoryError) as failure:
                log.info("no room beside the old model: %s", failure)
        self._unload()
        give_back_memory()  # what was tried beside it, too
        return self._build(request, cancelled)

    def _build(
        self, request: LoadRequest, cancelled: Callable[[], bool], beside: bool = False
    ) -> HostedEngine:
        def progress(progress: LoadProgress) -> None:
            if time.monotonic() >= self._progress_due_s:
                self._progress_due_s = time.monotonic() + PROGRESS_EVERY_S
                self._show(progress=progress)

        def publish(snapshot: TelemetrySnapshot) -> None:
            self._pipe.send({"op": "snapshot", "value": asdict(snapshot)})

        return self._assemble()(
            request, progress=progress, cancelled=cancelled, publish=publish, beside=beside
        )

    def _keep_previous(self, previous: LoadRequest | None, notice: str, next_step: str) -> None:
        if self._engine is None and previous is not None:
            try:
                self._engine = self._build(previous, lambda: False)
                self._loaded = previous
            except PreScopeError as failure:
                notice = f"{notice} {previous.model} could not come back: {failure.message}".strip()
        if self._engine is None:
            self._status = EngineStatus("empty")
        else:
            self._status = EngineStatus("ready", self._engine.name)
        self._show(notice=notice, next_step=next_step)

    def _unload(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = self._loaded = None

    def _change(self, change: Change) -> None:
        if self._engine is None:
            return
        try:
            if change.what == "policy":
                self._engine.set_policy(str(change.value))
            elif change.what == "prediction":
                self._engine.set_prediction(bool(change.value))
            else:
                self._engine.reset_predictor()
        except PreScopeError as failure:
            self._show(notice=failure.message, next_step=failure.next_step)

    def _begin(self, job: Job) -> None:
        """Hand a generation to the engine, beside those under way."""
        self._pipe.send({"op": "front", "id": job.request_id})
        try:
            if self._engine is None:
                raise RequestError("No model is loaded.", "Choose a model first.")
            generation = self._engine.submit(
                job.conversation_id,
                job.messages,
                job.params,
                lambda: self._inbox.is_stopped(job.request_id),
            )
        except Exception as failure:  # noqa: BLE001  the edge of the process: the app must hear of it
            self._fail(job, failure)
        else:
            self._answers.append((job, generation))
            self._tell(job, generation)

    def _advance(self) -> None:
        """Compute one pass for every generation and send what came of it."""
        assert self._engine is not None
        self._engine.step()
        if self._engine.remarks != self._status.remarks:
            self._show(remarks=self._engine.remarks)
        for job, generation in list(self._answers):
            self._tell(job, generation)

    def _tell(self, job: Job, generation: HostedGeneration) -> None:
        for chunk in generation.take():
            self._pipe.send({"op": "chunk", "id": job.request_id, "chunk": chunk_to_json(chunk)})
        if generation.over:
            self._answers.remove((job, generation))
            self._may_learn = True
            if generation.failure is not None:
                self._fail(job, generation.failure)
            else:
                self._inbox.ended(job.request_id)

    def _fail(self, job: Job, failure: Exception) -> None:
        """End one generation with words; the others go on unless the device is lost."""
        error = failure
        if not isinstance(error, PreScopeError):
            log.error("generation failed", exc_info=failure)
            reason = f"The model failed: {type(failure).__name__}: {failure}"
            error = PreScopeError(reason[:500], "Send the message again.")
        self._pipe.send({"op": "failed", "id": job.request_id, "error": error.to_json()})
        self._inbox.ended(job.request_id)
        if isinstance(failure, TransferError):
            leave(EXIT_DEVICE_LOST)  # the threads that bring experts hang or are gone
        broken = error is not failure and not isinstance(failure, MemoryError)
        if broken and self._engine is not None and not self._engine.device_works():
            leave(EXIT_DEVICE_LOST)  # a broken CUDA context cannot be repaired in place

    def _show(self, **changes: Any) -> None:
        self._status = replace(self._status, **changes)
        self._pipe.send({"op": "status", "load": self._load_number, "value": asdict(self._status)})


def serve_frames(descriptor: int, inbox: Inbox, pipe: Pipe) -> None:
    """Take the app's frames until it is gone, then end the process. Runs on its own thread."""
    try:
        for frame in read_frames(descriptor):
            try:
                take_frame(frame, inbox)
            except BusyError as busy:
                pipe.send({"op": "failed", "id": frame["id"], "error": busy.to_json()})
    except OSError:
        leave(EXIT_APP_GONE)
    except ProtocolError as failure:
        log.error("protocol: %s", failure.message)
        leave(EXIT_PROTOCOL)
    leave(EXIT_APP_GONE)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Serve one app over standard input and output until it goes away."""
    parser = argparse.ArgumentParser(prog="python -m runtime.host", description=__doc__)
    parser.add_argument(
        "--assembly",
        default="runtime.assembly",
        metavar="MODULE",
        help="the module whose `assemble` builds an engine (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    read_from, write_to = take_standard_streams()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the app
    volunteer_for_oom_kill()
    pipe, inbox = Pipe(write_to), Inbox()
    pipe.send({"op": "hello", "protocol": PROTOCOL_VERSION})

    def assemble() -> Assemble:
        built: Assemble = importlib.import_module(options.assembly).assemble
        return built

    threading.Thread(
        target=serve_frames, args=(read_from, inbox, pipe), name="reader", daemon=True
    ).start()
    Host(pipe, inbox, assemble).run()


if __name__ == "__main__":
    main()
