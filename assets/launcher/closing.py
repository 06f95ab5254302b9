"""Every way a person or the system ends the launcher, turned into one event."""

from __future__ import annotations

import ctypes
import signal
import socket
import sys
import threading
from collections.abc import Callable

# Windows ends the process five seconds after its window is closed.
WINDOWS_CLOSING_WITHIN_S = 4.5


class Closing:
    """`asked` is set by Ctrl-C, SIGTERM, a closed terminal or console window. Made by the main
    thread; `ask` may be called by any.

    Windows kills the process when the close handler returns, so the handler waits for `finished`.
    """

    def __init__(self, on_asked: Callable[[], None]) -> None:
        self.asked = threading.Event()
        self.finished = threading.Event()
        self._on_asked = on_asked
        self._asking = threading.Lock()
        self._hear_signals()
        if sys.platform == "win32":
            self._watch_console_window()

    def ask(self) -> None:
        with self._asking:
            first = not self.asked.is_set()
            self.asked.set()
        if first:
            threading.Thread(target=self._on_asked, daemon=True).start()

    def wait(self) -> None:
        """Until asked."""
        self.asked.wait()

    def _hear_signals(self) -> None:
        """A signal writes a byte at once, and a thread reads it.

        A handler in Python would run in the main thread, and not before that does its next step:
        never, if the signal comes while it goes to sleep. Nor may it touch what it interrupted.
        """
        heard, self._wakes = socket.socketpair()
        self._wakes.setblocking(False)
        signal.set_wakeup_fd(self._wakes.fileno())
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            number = getattr(signal, name, None)
            if number is None:
                continue
            # A terminal may close behind a launcher that was told to outlive it (nohup).
            if name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(heard,), daemon=True).start()

    def _listen(self, heard: socket.socket) -> None:
        while heard.recv(64):
            self.ask()

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
