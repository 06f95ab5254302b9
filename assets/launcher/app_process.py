"""The app as the launcher sees it: a child that lives exactly as long as the launcher does.

The child's standard input is a pipe held here. Its end of file tells the app to leave, whether the
launcher closed it or was killed; on every system, so there is no other way for an orphan to stay.
A child that does not leave in time is terminated, then killed with all it started.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from assets.launcher.environment import Environment
from assets.launcher.faults import AppFault
from assets.launcher.instance import RunningApp, read_app
from assets.launcher.places import ROOT, Places, quietly
from assets.launcher.report import LOG_ROTATES_AT_BYTES, Report

HEALTHY_WITHIN_S = 120.0
POLL_S = 0.05
LEAVES_WITHIN_S = 8.0
TERMINATES_WITHIN_S = 3.0


class AppProcess:
    """Started in the constructor. `stop` may be called from any thread, and twice."""

    def __init__(
        self,
        environment: Environment,
        places: Places,
        environ: dict[str, str],
        port: int | None,
        root: Path = ROOT,
    ) -> None:
        self._places = places
        command = [str(environment.python), "-m", "app", "--data-dir", str(places.data)]
        if port is not None:
            command += ["--port", str(port)]
        with rotated(places.app_log).open("ab") as log:
            self._log_begins_at = log.tell()
            self._child = subprocess.Popen(
                command,
                cwd=root,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
                # Ctrl-C and a closing terminal speak to the launcher only, which then ends the app.
                start_new_session=os.name != "nt",
            )

    def wait_until_healthy(self, report: Report, within_s: float = HEALTHY_WITHIN_S) -> RunningApp:
        """The app's own record, once it answers. Raises `AppFault` if it ends or stays silent."""
        deadline = time.monotonic() + within_s
        while True:
            report.check_stopped()
            status = self._child.poll()
            if status is not None:
                raise AppFault(
                    f"The app stopped while starting (exit status {status}): {self._last_words()}",
                    f"The whole story is in {self._places.app_log}. If a package is broken, "
                    "`launcher.py --reinstall` makes everything new.",
                )
            app = read_app(self._places)
            if app is not None and app.is_healthy():
                return app
            if time.monotonic() > deadline:
                raise AppFault(
                    f"The app did not answer within {within_s:.0f} seconds.",
                    f"Look into {self._places.app_log}, then retry.",
                )
            time.sleep(POLL_S)

    def poll(self) -> int | None:
        return self._child.poll()

    def wait(self) -> int:
        return self._child.wait()

    def stop(self) -> None:
        """Asks the app to leave, then insists. Afterwards nothing it started is left."""
        if self._child.stdin is not None:
            quietly(self._child.stdin.close)
        for insist, patience_s in (
            (None, LEAVES_WITHIN_S),
            (self._terminate, TERMINATES_WITHIN_S),
            (self._kill, None),
        ):
            if insist is not None:
                insist()
            try:
                self._child.wait(patience_s)
                return
            except subprocess.TimeoutExpired:
                continue

    def _terminate(self) -> None:
        if sys.platform == "win32":
            self._child.terminate()
        else:
            self._signal_group(signal.SIGTERM)

    def _kill(self) -> None:
        if sys.platform == "win32":
            command = ["taskkill", "/F", "/T", "/PID", str(self._child.pid)]
            subprocess.run(command, capture_output=True, check=False)
            self._child.kill()
        else:
            self._signal_group(signal.SIGKILL)

    if sys.platform != "win32":

        def _signal_group(self, number: int) -> None:
            """The app leads its own process group, so its engine hears it too."""
            if self._child.poll() is None:
                quietly(lambda: os.killpg(self._child.pid, number))

    def _last_words(self) -> str:
        with self._places.app_log.open("rb") as log:
            log.seek(self._log_begins_at)
            lines = log.read()[-4000:].decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1] if said else "it said nothing"


def rotated(log: Path) -> Path:
    """The same path, the old log moved aside when it has grown too long."""
    if log.exists() and log.stat().st_size > LOG_ROTATES_AT_BYTES:
        quietly(lambda: log.replace(log.with_suffix(".1.log")))
    return log
