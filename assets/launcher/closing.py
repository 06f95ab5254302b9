"""Every way a person or the system ends the launcher, turned into one event."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

# Windows ends the process five seconds after its window is closed.
WINDOWS_CLOSING_WITHIN_S = 4.5


class Closing:
    """`asked` is set by Ctrl-C, SIGTERM, a closed terminal or console window. Main thread only.

    Windows kills the process when the close handler returns, so the handler waits for `finished`.
    """

    def __init__(self, on_asked: Callable[[], None]) -> None:
        self.asked = threading.Event()
        self.finished = threading.Event()
        self._on_asked = on_asked
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None:
                continue
            # A terminal may close behind a launcher that was told to outlive it (nohup).
            if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: self.ask())
        if sys.platform == "win32":
            self._watch_console_window()

    def ask(self) -> None:
        first = not self.asked.is_set()
        self.asked.set()
        if first:
            # Not in the signal handler itself: what it interrupted may hold the locks needed here.
            threading.Thread(target=self._on_asked, daemon=True).start()

    def wait(self) -> None:
        """Until asked. In slices, because Windows runs signal handlers only between them."""
        while not self.asked.wait(0.5 if os.name == "nt" else 3600.0):
            continue

    def _watch_console_window(self) -> None:
        if sys.platform == "win32":
            kernel = ctypes.WinDLL("kernel32")
            handler_type = ctypes.WINFUNCTYPE(ctypes.c_int, ctypes.c_uint)

            def on_event(kind: int) -> int:
                if kind < 2:  # Ctrl-C and Ctrl-Break come as signals
                    return 0
                self.ask()
                self.finished.wait(WINDOWS_CLOSING_WITHIN_S)
                return 1

            # Windows keeps only a pointer: the callback has to outlive this call.
            self._console_handler = handler_type(on_event)
            kernel.SetConsoleCtrlHandler(self._console_handler, 1)
