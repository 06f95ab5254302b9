"""A copy of the launcher beside a small app of our own, run as a person runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from assets.launcher.environment import Environment, environment_for, wanted_key
from assets.launcher.places import ROOT, Places

WITHIN_S = 60.0

# Keeps the contract with the launcher: binds, writes app.json, answers, leaves at end of input.
FAKE_APP = """
import argparse, http.server, json, os, subprocess, sys, threading
parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--port", type=int, default=0)
options = parser.parse_args()
behaviour = os.environ.get("FAKE_APP", "")
run = os.path.join(options.data_dir, "run")
with open(os.path.join(run, "starts"), "a") as starts:
    starts.write(f"{os.getpid()}\\n")
if behaviour == "crash":
    sys.exit("the fake app cannot start")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"ok")
    def log_message(self, *arguments):
        pass

try:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
except OSError:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
engine = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"],
                          stdin=subprocess.PIPE)
mine = os.path.join(run, "app.json")
with open(mine + ".tmp", "w") as file:
    json.dump({"port": server.server_port, "token": "t0ken", "pid": os.getpid(),
               "engine": engine.pid}, file)
os.replace(mine + ".tmp", mine)

def leave_at_end_of_input():
    sys.stdin.buffer.read()
    if behaviour == "deaf":
        return
    server.shutdown()

if behaviour == "deaf":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
threading.Thread(target=leave_at_end_of_input, daemon=True).start()
server.serve_forever(0.05)
engine.stdin.close()
engine.wait()
os.unlink(mine)
"""

FAKE_RUNTIME = """
import json, os, sys
print(json.dumps({"arguments": sys.argv[1:], "cwd": os.getcwd(), "data": os.environ["PRESCOPE_DATA_DIR"]}))
sys.exit(7 if "fail" in sys.argv else 0)
"""  # noqa: E501 - one line of output


class Tree:
    """`root` holds launcher.py, assets/launcher, a lock, a fake app and a fake runtime."""

    def __init__(self, root: Path, data: Path) -> None:
        self.root = root
        self.places = Places(data)
        self.lock_folder = root / "assets" / "lock"
        self.environ = {
            **os.environ,
            "PRESCOPE_TORCH": "configured",
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_CACHE_DIR": "1",
            "NO_PROXY": "127.0.0.1",
        }
        for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PRESCOPE_DATA_DIR"):
            self.environ.pop(name, None)
        self._started: list[subprocess.Popen[str]] = []
        ignored = shutil.ignore_patterns("__pycache__", "icon")
        shutil.copytree(ROOT / "assets" / "launcher", root / "assets" / "launcher", ignore=ignored)
        shutil.copy(ROOT / "launcher.py", root)
        self.lock_folder.mkdir()
        for name in ("pip.txt", "requirements.txt", "torch.txt", "test.txt"):
            (self.lock_folder / name).write_text("torch==1.0\n" if name == "torch.txt" else "")
        for package, text in (("app", FAKE_APP), ("runtime", FAKE_RUNTIME)):
            (root / package).mkdir()
            (root / package / "__main__.py").write_text(text)

    def pretend_installed(self) -> Environment:
        """An environment that is this test's own Python, as if it had been installed."""
        key = wanted_key("configured", self.lock_folder)
        ready = environment_for(self.places, key)
        self.places.prepare()
        ready.python.parent.mkdir(parents=True)
        ready.python.symlink_to(sys.executable)
        # What makes the interpreter behind the link take its own standard library and packages.
        (ready.folder / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).parent}\n")
        self.places.current.write_text(json.dumps({"key": key, "wanted": "configured"}))
        return ready

    def command(self, *arguments: str) -> list[str]:
        data = ["--data-dir", str(self.places.data)]
        return [sys.executable, str(self.root / "launcher.py"), "--no-browser", *data, *arguments]

    def run(self, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.run_command(self.command(*arguments), cwd)

    def run_command(
        self, command: list[str], cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environ,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=WITHIN_S * 3,
            check=False,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """As from a terminal that may close, though these tests may run under nohup."""
        launcher = subprocess.Popen(
            self.command(*arguments),
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        self._started.append(launcher)
        return launcher

    def wait_for_app(self) -> dict[str, int]:
        """The fake app's own record."""
        file = self.places.app_file
        wait_until(file.exists, "the app to be up")
        record: dict[str, int] = json.loads(file.read_text())
        return record

    def app_starts(self) -> list[int]:
        file = self.places.run / "starts"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def close(self) -> None:
        for launcher in self._started:
            if launcher.poll() is None:
                launcher.kill()
            launcher.wait()
            if launcher.stdout is not None:
                launcher.stdout.close()
        for pid in self.app_starts():
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)


def wait_until(true: Callable[[], bool], what: str, within_s: float = WITHIN_S) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, f"waited {within_s} s for {what}"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """A zombie is dead: it only waits to be counted."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] != "Z"
