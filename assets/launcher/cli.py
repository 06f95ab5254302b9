"""The launcher's commands. Everything but the app itself turns into the environment's Python."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from assets.launcher.children import Children, clean_environ
from assets.launcher.environment import Environment, mark_stale
from assets.launcher.faults import Fault, Stopped, from_os_error
from assets.launcher.install import Installer
from assets.launcher.instance import FileLock
from assets.launcher.places import ROOT, Places, data_folder
from assets.launcher.report import Report
from assets.launcher.workshop import Workshop

RUNTIME_COMMANDS = {
    "probe": "measure this computer",
    "plan": "what of a MODEL would go where",
    "chat": 'answer one prompt: chat MODEL "prompt"',
    "bench": "run a benchmark suite",
    "doctor": "look for problems and say what to do",
}
OWN_COMMANDS = {
    "test": "every check: ruff, mypy, pytest; with arguments only pytest, given those",
    "python": "the environment's own Python",
    "shortcut": "put something to double-click on the desktop (--here: beside launcher.py)",
    "timing": "seconds from start to usable page, as a ratio to importing gradio",
}
TAKE_A_VALUE = ("--data-dir", "--port")
USAGE_ERROR = 2


def main(arguments: Sequence[str]) -> int:
    """The exit status. On POSIX a command that runs elsewhere does not come back."""
    began = time.monotonic()
    head, command, rest = split(arguments)
    options = parser().parse_args(head)
    if command is not None and command not in RUNTIME_COMMANDS and command not in OWN_COMMANDS:
        parser().error(f"there is no command '{command}'; see --help")
    if command in RUNTIME_COMMANDS and options.data_dir is None:
        options.data_dir = value_of("--data-dir", rest)
    try:
        places = Places(data_folder(options.data_dir))
        places.prepare()
        if options.reinstall:
            mark_stale(places)
        if command is None:
            # Imported here: commands for scripts should not pay for the page's modules.
            from assets.launcher.session import Wishes, run_app

            wishes = Wishes(options.port, not options.no_browser, options.yes)
            return run_app(places, wishes, began)
        return run_command(command, rest, places, options.yes)
    except Fault as fault:
        return failed(fault, rest)
    except OSError as error:
        return failed(from_os_error("Starting PreScope", error), rest)
    except (KeyboardInterrupt, Stopped):
        print("Stopped.", file=sys.stderr)
        return 130


def failed(fault: Fault, rest: Sequence[str]) -> int:
    print(f"{fault}\n{fault.next_step}", file=sys.stderr)
    if "--json" in rest:
        print(json.dumps(fault.as_json()))
    return 1


def split(arguments: Sequence[str]) -> tuple[list[str], str | None, list[str]]:
    """The launcher's own options, the command, and what belongs to the command."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-"):
        at += 2 if arguments[at] in TAKE_A_VALUE else 1
    command = arguments[at] if at < len(arguments) else None
    return list(arguments[:at]), command, list(arguments[at + 1 :])


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == option:
            return arguments[index + 1] if index + 1 < len(arguments) else None
        if argument.startswith(option + "="):
            return argument.split("=", 1)[1]
    return None


def parser() -> argparse.ArgumentParser:
    described = {**OWN_COMMANDS, **RUNTIME_COMMANDS}
    commands = "\n".join(f"  {name:<9} {about}" for name, about in described.items())
    made = argparse.ArgumentParser(
        prog="launcher.py",
        usage="launcher.py [options] [command [arguments]]",
        description="Installs PreScope the first time, then opens it in the browser.",
        epilog=f"commands:\n{commands}\n\nEvery command takes --help, and most take --json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument(
        "--data-dir",
        metavar="D",
        help="where everything is kept (else PRESCOPE_DATA_DIR, else the system's usual place)",
    )
    made.add_argument("--port", type=port_number, metavar="N", help="the app's port, if it is free")
    made.add_argument("--no-browser", action="store_true", help="only print the address")
    made.add_argument(
        "--reinstall", action="store_true", help="choose and install every package again first"
    )
    made.add_argument("--yes", action="store_true", help="agree to downloads above 1 GB")
    return made


def port_number(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"a port is between 1 and 65535, not {number}")
    return number


def run_command(command: str, rest: list[str], places: Places, assume_yes: bool) -> int:
    """Standard output belongs to the command; whatever installing has to say goes to stderr."""
    if command == "shortcut":
        from assets.launcher.shortcut import create

        for made in create(beside="--here" in rest):
            print(made)
        return 0
    report = Report(sys.stderr, places.launcher_log, assume_yes)
    installer = Installer(Workshop(places, report, Children()))
    ready, used = installer.enter()
    environ = clean_environ(os.environ, places.data)
    if command == "python":
        return become(ready, used, rest, environ)
    if command == "test":
        installer.ensure_test_tools(ready)
        os.chdir(ROOT)
        return become(ready, used, ["-m", "assets.launcher.checks", *rest], environ)
    if command == "timing":
        from assets.launcher.timing import measure

        print(json.dumps(measure(ready, places, environ)))
        return 0
    # The person's own folder stays the current one, so that a MODEL may be a relative path; but
    # what lies there must not be imported in place of ours.
    environ["PYTHONPATH"] = str(ROOT)
    environ["PYTHONSAFEPATH"] = "1"
    return become(ready, used, ["-m", "runtime", command, *rest], environ)


def become(
    ready: Environment, used: FileLock, arguments: list[str], environ: dict[str, str]
) -> int:
    """Turns this process into the environment's Python: its status, its signals, its terminal.

    Windows cannot, so there a child does the work and the launcher passes its status on.
    """
    command = [str(ready.python), *arguments]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        used.keep_across_exec()
        os.execve(command[0], command, environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the child hears Ctrl-C too and decides
    return subprocess.run(command, env=environ, check=False).returncode
