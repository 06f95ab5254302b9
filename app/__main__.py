"""`python -m app --data-dir D [--port N]`: serve the page until told to stop."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import threading
from pathlib import Path

from app import environment, server
from runtime.errors import PreScopeError


def main(arguments: list[str] | None = None) -> int:
    """Run the app and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m app", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="where chats and logs are")
    parser.add_argument("--port", type=int, default=0, help="0 takes any free port")
    parser.add_argument("--engine", default="runtime.client:LocalEngine", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        return _serve(options.data_dir.expanduser().resolve(), options.port, options.engine)
    except PreScopeError as error:
        sys.stderr.write(f"{error.message} {error.next_step}\n")
        return 2


def _serve(data_dir: Path, port: int, engine_spec: str) -> int:
    environment.log_to(data_dir / "logs")
    environment.prepare_environment(data_dir)
    app = server.AppServer(data_dir, port, server.engine_maker(engine_spec))
    closed = threading.Event()
    server.leave_on_signals(app)
    server.leave_with_parent(app)
    console_hook = _leave_with_console(app, closed)
    server.start_loading(app)
    if sys.stdout is not None and sys.stdout.isatty():
        sys.stdout.write(f"PreScope is at {app.url}\n")
    try:
        app.run()
    finally:
        app.close()
        closed.set()
        del console_hook
    return 0


def _leave_with_console(app: server.AppServer, closed: threading.Event) -> object:
    """Windows: end cleanly when the console window closes, or the person signs out.

    The caller keeps what is returned for as long as the app runs.
    """
    if sys.platform == "win32":

        def leave(event: int) -> bool:
            app.leave()
            closed.wait(4.0)
            return event in (2, 5, 6)

        hook = ctypes.WINFUNCTYPE(ctypes.c_bool, ctypes.c_uint)(leave)
        ctypes.windll.kernel32.SetConsoleCtrlHandler(hook, True)
        return hook
    else:
        return None


if __name__ == "__main__":
    sys.exit(main())
