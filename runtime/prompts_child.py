"""The program that renders chat templates: a process of its own with little memory and time.

A template is a stranger's program. The sandbox keeps it from Python's insides but bounds neither
its time nor its memory, so it runs here, without open files or the right to open any, and a bad
one ends this process and nothing else. Run as a script; imports nothing of PreScope.

One JSON object a line: {"template", "turns", "variables", "cpu_s"} in; {"text"}, {"refused"} (the
template itself said no) or {"failed"} out.
"""

from __future__ import annotations

import datetime
import io
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.constants
import jinja2.debug
import jinja2.ext
import jinja2.sandbox

MEMORY_BYTES = 256 * 2**20
SPARE_CHARACTERS = 2**20
"""A template may write this much beside twice what it is given."""


class Refusal(jinja2.TemplateError):
    """What `raise_exception` raises inside a template."""


class Generation(jinja2.ext.Extension):
    """Lets `{% generation %}` stand: it marks what to train on, which is nothing here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        """Return the block's content alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Return an environment in which templates see what transformers shows them."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return made


def render(template: str, turns: list[dict[str, str]], variables: dict[str, Any]) -> str:
    """Return the conversation as the template writes it, up to where the answer begins.

    Raises:
        ValueError: it wrote far more than it was given.
    """
    given = sum(len(turn.get("content") or "") for turn in turns)
    most = 2 * given + SPARE_CHARACTERS
    compiled = environment().from_string(template)
    values = {**variables, "messages": turns, "add_generation_prompt": True}
    values |= {"tools": None, "documents": None}
    pieces, written = [], 0
    for piece in compiled.generate(values):
        pieces.append(piece)
        written += len(piece)
        if written > most:
            raise ValueError(f"it wrote more than {most:,} characters")
    return "".join(pieces)


def main() -> None:
    """Serve requests until the end of standard input."""
    _import_what_comes_late()
    memory = open("/proc/self/statm", "rb", buffering=0) if sys.platform == "linux" else None
    _give_up_rights()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        turns = request["turns"]
        given = sum(len(turn.get("content") or "") for turn in turns)
        with _limited(memory, MEMORY_BYTES + 32 * given, request["cpu_s"]):
            answer = _answer(request["template"], turns, request["variables"])
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


def _import_what_comes_late() -> None:
    for codec in ("unicode_escape", "ascii", "latin-1", "utf-8", "utf-16"):
        "a\\n".encode(codec).decode(codec)
    made = environment()
    made.from_string("{{ [1] | tojson }}{{ 'a\\n' | upper }}{{ strftime_now('%d %b') }}").render()
    for failing in ("{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('') }}", "{{ [] | first.x }}"):
        _answer(failing, [], {})


def _answer(template: str, turns: list[dict[str, str]], variables: dict[str, Any]) -> Any:
    try:
        return {"text": render(template, turns, variables)}
    except Refusal as refusal:
        return {"refused": str(refusal)[:1000]}
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as failure:  # noqa: BLE001  whatever a stranger's program raises is its end
        return {"failed": f"{failure!s:.1000}" or type(failure).__name__}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes what HTML would read.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: object = "") -> None:
    raise Refusal(str(message))


def _give_up_rights() -> None:
    """Open nothing any more: no file, no socket, no other program."""
    if sys.platform == "win32":
        return
    import resource

    for limit, value in ((resource.RLIMIT_NOFILE, 3), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextmanager
def _limited(memory: io.FileIO | None, memory_bytes: int, cpu_s: float) -> Iterator[None]:
    """Bound time and memory; past its time the process ends, also inside one long operation.

    `memory` tells how much is used now. On Windows neither can be bounded from inside: there the
    app's deadline alone ends it. Elsewhere but on Linux, memory cannot.
    """
    if sys.platform == "win32":
        yield
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if memory is not None:
        memory.seek(0)
        most = int(memory.read().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


if __name__ == "__main__":
    main()
