"""One run of the engine process, seen from the app: its pipes, its log, how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from runtime.config import DATA_DIR_VARIABLE
from runtime.errors import EngineDiedError
from runtime.wire import Frame, encode_frame, read_frames, write_all

ROOT = Path(__file__).resolve().parent.parent
LOG_NAME = "engine.log"
MAX_LOG_BYTES = 5 * 2**20
END_DEADLINE_S = 10.0

_SIGNALS = {
    "SIGKILL": "it was stopped by the system, most likely because memory ran out",
    "SIGSEGV": "it crashed inside a native library (segmentation fault)",
    "SIGBUS": "a file it was reading changed or the disk went away (bus error)",
    "SIGABRT": "a native library gave up (abort)",
    "SIGILL": "this processor lacks an instruction a library needs (illegal instruction)",
    "SIGTERM": "something asked it to end",
}
_CODES = {
    0: "it ended by itself",
    4: "it did not understand what it was sent",
    5: "the graphics card or its driver reported an error that only a new process clears",
    0xC0000005: "it crashed inside a native library (access violation)",
    0xC0000017: "memory ran out",
}


class EngineProcess:
    """A started host. Any thread may `send` and `kill`; one thread reads `frames` to the end."""

    def __init__(
        self, host_arguments: Sequence[str], log_dir: Path | None, hello_deadline_s: float
    ) -> None:
        """Start the process; it is ended if `greeted` is not called within the deadline.

        Raises:
            OSError: it cannot be started.
        """
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if log_dir is not None:
            environment[DATA_DIR_VARIABLE] = str(log_dir.parent)
        with _open_log(log_dir) as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.host", *host_arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                bufsize=0,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            )
        self._writing = threading.Lock()
        self._killed_because = ""
        self._hello = threading.Timer(
            hello_deadline_s, self.kill, [f"it said nothing for {hello_deadline_s:.0f} s"]
        )
        self._hello.daemon = True
        self._hello.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, frame: Frame) -> None:
        """Send a frame; if the process is gone, nothing happens: its end is noticed by `frames`.

        Raises:
            ProtocolError: the frame is too large; nothing was sent.
        """
        data = encode_frame(frame)
        assert self._process.stdin is not None
        with self._writing:
            try:
                write_all(self._process.stdin.fileno(), data)
            except (OSError, ValueError):  # ValueError: the pipe was closed on our side
                return

    def frames(self) -> Iterator[Frame]:
        """Yield what the process sends until it ends.

        Raises:
            ProtocolError: it sent something that is not a frame.
        """
        assert self._process.stdout is not None
        yield from read_frames(self._process.stdout.fileno())

    def greeted(self) -> None:
        """Note that the process has said hello."""
        self._hello.cancel()

    def kill(self, because: str) -> None:
        """End the process now; `because` explains it to a person."""
        self._killed_because = self._killed_because or because
        self._process.kill()

    def reap(self) -> str:
        """Wait for the end, close the pipes and return why it ended, as part of a sentence."""
        self._hello.cancel()
        try:
            code = self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:  # its pipe is closed, but something in it hangs
            self.kill("it hung on its way out")
            code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        return self._killed_because or explain_exit(code)


def explain_exit(code: int) -> str:
    """Say what an exit code or signal means, as part of a sentence."""
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        return _SIGNALS.get(name, f"it was ended by {name}")
    return _CODES.get(code, f"it ended with exit code {code}")


def died(reason: str, log_dir: Path | None) -> EngineDiedError:
    """Return the error for a generation that the end of the process cut short."""
    where = f" Details: {log_dir / LOG_NAME}" if log_dir is not None else ""
    return EngineDiedError(
        f"The engine stopped: {reason}.", f"Send the message again; the engine restarts.{where}"
    )


def _open_log(log_dir: Path | None) -> BinaryIO:
    if log_dir is None:
        return open(os.devnull, "ab")
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / LOG_NAME
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return open(path, "ab")
