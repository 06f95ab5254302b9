"""Starting other programs: a clean environment for them, and none left behind."""

from __future__ import annotations

import os
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from assets.launcher.faults import Stopped

LEASH = Path(__file__).with_name("leash.py")
TAIL_LINES = 25

# What another program set for itself and would mislead ours. Index, proxy and certificate settings
# (PIP_INDEX_URL, PIP_CONFIG_FILE, PIP_FIND_LINKS, HTTPS_PROXY, SSL_CERT_FILE...) are kept.
DROPPED_PREFIXES = ("PYTHON", "GRADIO_", "CONDA_", "UV_", "UVICORN_")
DROPPED = frozenset(
    {
        "PIP_CONSTRAINT",
        "PIP_DRY_RUN",
        "PIP_FORCE_REINSTALL",
        "PIP_IGNORE_INSTALLED",
        "PIP_NO_DEPS",
        "PIP_PREFIX",
        "PIP_PRE",
        "PIP_PYTHON",
        "PIP_REPORT",
        "PIP_REQUIRE_VIRTUALENV",
        "PIP_REQUIREMENT",
        "PIP_ROOT",
        "PIP_TARGET",
        "PIP_UPGRADE",
        "PIP_USER",
        "VIRTUAL_ENV",
        "VIRTUAL_ENV_PROMPT",
        "__PYVENV_LAUNCHER__",
    }
)
ALWAYS_SET = {
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INPUT": "1",
    "PYTHONNOUSERSITE": "1",
    "PYTHONUTF8": "1",
}


def clean_environ(environ: Mapping[str, str], data: Path | None = None) -> dict[str, str]:
    """The person's environment without what belongs to other Pythons, plus the data folder."""
    kept = {
        name: value
        for name, value in environ.items()
        if name.upper() not in DROPPED and not name.upper().startswith(DROPPED_PREFIXES)
    }
    kept.update(ALWAYS_SET)
    if data is not None:
        kept["PRESCOPE_DATA_DIR"] = str(data)
    return kept


class Children:
    """The leashed children of this launcher; `stop_all` ends them and refuses new ones.

    `run` is called by the working thread, `stop_all` by any.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def run(
        self,
        python: Path | str,
        module: str,
        arguments: Sequence[str],
        environ: Mapping[str, str],
        on_line: Callable[[str], None],
        timeout_s: float | None = None,
    ) -> tuple[int, list[str]]:
        """Exit status and last lines of `python -m module arguments`; its output goes line by line
        to `on_line`. Past `timeout_s` the child is killed. Raises `Stopped` after `stop_all`."""
        with self._lock:
            if self._stopped:
                raise Stopped
            child = subprocess.Popen(
                [str(python), str(LEASH), module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=dict(environ),
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                # Ctrl-C in the console is for the launcher, which then ends its children in order.
                start_new_session=os.name != "nt",
            )
            self._running.add(child)
        alarm = threading.Timer(timeout_s, child.kill) if timeout_s else None
        tail: deque[str] = deque(maxlen=TAIL_LINES)
        try:
            if alarm:
                alarm.daemon = True
                alarm.start()
            assert child.stdout is not None
            for line in child.stdout:
                tail.append(line.rstrip())
                on_line(line.rstrip())
            status = child.wait()
        finally:
            if alarm:
                alarm.cancel()
            self._end(child)
        if self._stopped:
            raise Stopped
        return status, list(tail)

    def stop_all(self) -> None:
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for child in running:
            child.kill()

    def _end(self, child: subprocess.Popen[str]) -> None:
        with self._lock:
            self._running.discard(child)
        if child.poll() is None:
            child.kill()
            child.wait()
        for stream in (child.stdin, child.stdout):
            if stream is not None:
                stream.close()
