"""One run of PreScope from the double-click to the closed window."""

from __future__ import annotations

import os
import platform
import sys
import threading
import time
from dataclasses import dataclass

from assets.launcher import browser, environment, gpu, torch_build
from assets.launcher.app_process import AppProcess
from assets.launcher.children import Children, clean_environ
from assets.launcher.closing import Closing
from assets.launcher.environment import Environment
from assets.launcher.faults import AppFault, Fault, Stopped, from_os_error
from assets.launcher.install import Installer
from assets.launcher.instance import FileLock, clear_stale, other_instance
from assets.launcher.places import Places, quietly, read_json, write_private_json
from assets.launcher.progress_page import ProgressPage
from assets.launcher.report import Report
from assets.launcher.workshop import Workshop

WATCH_EVERY_S = 0.5
# By then the tab has turned into the app: browsers let hidden tabs ask only once a minute.
PAGE_STAYS_S = 150.0
WORKER_LEAVES_WITHIN_S = 3.0


@dataclass(frozen=True)
class Wishes:
    """What the person said on the command line."""

    port: int | None = None
    open_browser: bool = True
    assume_yes: bool = False


def run_app(places: Places, wishes: Wishes, began: float) -> int:
    """Runs PreScope, or shows the one that is running. The exit status of the launcher.

    `began` is time.monotonic() at the start of the process, for the timing line.
    """
    lock = FileLock(places.run / "launcher.lock")
    while not lock.acquire():
        address = other_instance(places)
        if address is not None:
            print(f"PreScope is already running: {address}", flush=True)
            if wishes.open_browser:
                browser.open_page(address)
            return 0
        if lock.acquire():
            break
        raise AppFault(
            "Another PreScope has been started for this data folder but shows no page.",
            f"Close it, or use another --data-dir. Its log: {places.launcher_log}",
        )
    try:
        clear_stale(places)
        return Session(places, wishes, began).run()
    finally:
        lock.release()


class Session:
    """Owns the page, the children and the app of one run; `run` is called once, by the main thread.

    A working thread installs and starts; the main thread waits for the end, because signals arrive
    there.
    """

    def __init__(self, places: Places, wishes: Wishes, began: float) -> None:
        self._places = places
        self._wishes = wishes
        self._began = began
        self._report = Report(sys.stdout, places.launcher_log, wishes.assume_yes)
        self._children = Children()
        self._installer = Installer(Workshop(places, self._report, self._children))
        self._closing = Closing(self._stop_work)
        self._page = ProgressPage(self._report)
        self._app: AppProcess | None = None
        self._status = 1

    def run(self) -> int:
        self._page.start()
        write_private_json(self._places.page_file, {"url": self._page.url})
        if self._wishes.open_browser:
            self._report.page_is_open = browser.open_page(self._page.url)
            if not self._report.page_is_open:
                self._report.console(f"Open this address in a browser: {self._page.url}")
        worker = threading.Thread(target=self._work, daemon=True)
        worker.start()
        try:
            self._closing.wait()
            # It may be waiting for a silent server; what it has fetched is safe on disk.
            worker.join(WORKER_LEAVES_WITHIN_S)
        finally:
            if self._app is not None:
                self._app.stop()
            self._close_page()
            quietly(self._places.app_file.unlink)
            self._report.line("PreScope is closed.")
            self._report.close()
            self._closing.finished.set()
        return self._status

    def _close_page(self) -> None:
        quietly(self._places.page_file.unlink)
        self._page.stop()

    def _stop_work(self) -> None:
        self._report.stop()
        self._children.stop_all()

    def _work(self) -> None:
        """Until the app runs and has ended, the person gave up, or there is nobody to ask."""
        try:
            while not self._attempt():
                self._report.wait_for_retry()
        except Stopped:
            self._status = 0
            self._report.log_only("Stopped by the person.")
        finally:
            self._closing.ask()

    def _attempt(self) -> bool:
        """Whether this is the end of it; False asks for another attempt."""
        try:
            ready, used = self._installer.enter()
            try:
                self._run_in(ready)
            finally:
                used.release()
        except Fault as fault:
            self._report.fail(fault)
        except OSError as error:
            self._report.fail(from_os_error("Starting PreScope", error))
        else:
            self._status = 0
            return True
        return not self._report.page_is_open

    def _run_in(self, ready: Environment) -> None:
        self._report.step("Starting PreScope", 0.97, 1.0)
        environ = clean_environ(os.environ, self._places.data)
        starting = time.monotonic()
        self._app = AppProcess(ready, self._places, environ, self._wishes.port)
        try:
            running = self._app.wait_until_healthy(self._report)
        except AppFault:
            self._app.stop()
            raise
        now = time.monotonic()
        self._report.line(
            f"[timing] usable after {now - self._began:.2f} s, of which the app took "
            f"{now - starting:.2f} s"
        )
        if self._wishes.port not in (None, running.port):
            self._report.line(f"Port {self._wishes.port} is taken; using {running.port}.")
        # To the console only: the address carries the token, and logs get shown around.
        self._report.console(f"PreScope is at {running.url}")
        self._report.console("Close this window or press Ctrl-C to end it.")
        self._report.ready(running.url)
        self._installer.tidy(ready)
        self._reconsider_build()
        self._watch_app(self._app)

    def _watch_app(self, app: AppProcess) -> None:
        page_closes_at = time.monotonic() + PAGE_STAYS_S
        while app.poll() is None:
            if self._closing.asked.wait(WATCH_EVERY_S):
                return
            if time.monotonic() > page_closes_at:
                self._close_page()
        if app.poll() != 0:
            raise AppFault(
                f"PreScope stopped by itself (exit status {app.poll()}).",
                f"Your chats are safe. The log is {self._places.app_log}; start PreScope again.",
            )

    def _reconsider_build(self) -> None:
        """A card or a driver that came later gets its build of torch at the next start."""
        if os.environ.get("PRESCOPE_TORCH") or platform.system() == "Darwin":
            return
        suits = torch_build.suitable(gpu.probe(), platform.system())[0].name
        at_install = read_json(self._places.current).get("suits", suits)
        if suits != at_install:
            environment.mark_stale(self._places)
            self._report.line(
                f"This computer suited torch for {at_install} and now suits {suits}; the next "
                "start installs that."
            )
