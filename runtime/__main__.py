"""The command line: `python -m runtime COMMAND`.

With `--json` a command prints exactly one JSON object on standard output, whatever its libraries
print; everything for a person goes to standard error. A failure prints
`{"error": {"type", "message", "next_step"}}` and exits with 1, a wrong usage with 2.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from runtime.commands import COMMANDS
from runtime.core import EXPERTS_WISHES, POLICIES
from runtime.errors import ConfigError, PreScopeError
from runtime.eviction_table import EVICTIONS
from runtime.private_streams import private_output

USAGE = 2
INTERRUPTED = 130


class _UsageError(ConfigError):
    """A command line that cannot be understood."""


class _Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that `--json` gets its error as JSON."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{self.prog}: {message}", f"See {self.prog} --help.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = _Parser(prog="python -m runtime", description="PreScope on the command line.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = _common_options()
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.help, description=command.help, parents=[common]
        )
        for argument, options in command.arguments.items():
            sub.add_argument(argument, **options)
    return parser


def _common_options() -> _Parser:
    common = _Parser(add_help=False)
    add = common.add_argument_group("common options").add_argument
    add("--json", action="store_true", help="print one JSON object on standard output, only that")
    add("--data-dir", metavar="DIR", help="data folder (else PRESCOPE_DATA_DIR, else the system's)")
    add("--policy", choices=POLICIES, help="what to do with experts that are not in a slot")
    add(
        "--eviction",
        choices=sorted(EVICTIONS),
        help="who leaves a slot under prescope, hybrid or on-demand (default: the policy's own)",
    )
    add(
        "--experts",
        choices=[wish for wish in EXPERTS_WISHES if wish != "as stored"],
        help="quantise experts of 16 or 32 bits while loading; kept on disk for the next load",
    )
    add("--no-prediction", action="store_true", help="copy nothing ahead of its layer")
    add(
        "--cache-fraction",
        type=_number(0.0, 1.0),
        metavar="F",
        help="share of all experts that fit in slots, 0 to 1; at least one layer's top-k",
    )
    add("--vram", type=_size, metavar="SIZE", help="budget on the card, such as 8GiB or 8e9 bytes")
    add("--ram", type=_size, metavar="SIZE", help="budget in RAM; the disk holds what is left over")
    add(
        "--link-bytes-per-s",
        type=_number(1.0, 1e15),
        metavar="RATE",
        help="link rate in place of the probed one",
    )
    add("--seed", type=int, metavar="N", help="seed of the sampling; the same seed, the same text")
    add("--max-new-tokens", type=_whole, default=512, metavar="N", help="(default: %(default)s)")
    add(
        "--virtual-clock",
        action="store_true",
        help="let an emulated card run on modelled time alone, for tests and benches",
    )
    return common


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if "--json" not in given:
        return _run(given, None)
    with private_output() as write:

        def answer(result: dict[str, Any]) -> None:
            write((json.dumps(result, allow_nan=False) + "\n").encode("ascii"))

        return _run(given, answer)


def _run(given: Sequence[str], answer: Any | None) -> int:
    """Run the command; `answer` takes the JSON object, None stands for a person reading."""

    def say(text: str) -> None:
        print(text, end="", flush=True, file=sys.stderr if answer else sys.stdout)

    try:
        options = build_parser().parse_args(given)
        command = COMMANDS[options.command]
        module = importlib.import_module(command.module)
        result: dict[str, Any] = module.run(options, say)
        if answer is not None:
            answer(result)
        else:
            say(module.tell(result))
        return 0 if result.get("ok", True) else 1
    except PreScopeError as failure:
        _report(failure, answer)
        return USAGE if isinstance(failure, _UsageError) else 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return INTERRUPTED
    except Exception as failure:
        # The edge of the program: a script that asked for JSON gets JSON, the log the traceback.
        logging.exception("unexpected failure")
        _report(PreScopeError(f"{type(failure).__name__}: {failure}", "Please report it."), answer)
        return 1


def _report(failure: PreScopeError, answer: Any | None) -> None:
    if answer is None:
        print(f"{failure.message}\n{failure.next_step}".strip(), file=sys.stderr)
        return
    record = failure.to_json()
    if isinstance(failure, _UsageError):
        record["type"] = ConfigError.__name__
    answer({"error": record})


def _number(low: float, high: float) -> Any:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return value

    parse.__name__ = "number"
    return parse


def _size(text: str) -> int:
    number = re.fullmatch(r"(?i)([0-9.]+(?:e[0-9]+)?) *([kmgt]?)(i?)b?", text.strip())
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 8GiB, 24GB or 8e9")
    power = " kmgt".index(number[2].lower() or " ")
    return _whole(str(float(number[1]) * (1024 if number[3] else 1000) ** power))


def _whole(text: str) -> int:
    value = float(text)
    if not 1 <= value <= 2**53 or value != int(value):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(value)


if __name__ == "__main__":
    sys.exit(main())
