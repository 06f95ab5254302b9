"""A stranger's tokenizer, opened in a process that may be ended, before it is opened in ours.

tokenizer.json holds regular expressions and normalisers that a library compiles and runs without
bounds. What takes too long, needs too much or crashes there is refused by name here.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtime.errors import ModelFilesError

DEADLINE_S = 30.0
MEMORY_BYTES = 4 * 2**30
"""A vocabulary of 260,000 takes about 0.5 GB; address space is counted, which is more."""

CHILD = """
import sys
sys.path[:] = [p for p in sys.path if p]
from tokenizers import Tokenizer
if sys.platform == "linux":
    import resource, signal
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[3]))
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
    units = ("a", "1", " ", "\\n", "<", "\\u00e9\\u8a9e")
    for text in [unit * 2000 + "!" for unit in units]:
        tokenizer.encode(text)
except BaseException as error:
    sys.stdout.write(repr(error)[:300])
    sys.exit(3)
"""
_CPU_S = 20.0
_AGAIN = "Download the model again, or choose another one."


def check_tokenizer(path: Path, *, deadline_s: float = DEADLINE_S, cpu_s: float = _CPU_S) -> None:
    """Open a tokenizer file and encode a few texts that are hard for bad expressions.

    Raises:
        ModelFilesError: it is damaged, or took more time or memory than any honest one.
    """
    command = [sys.executable, "-I", "-c", CHILD, str(path), str(MEMORY_BYTES), str(cpu_s)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as slow:
        raise ModelFilesError(
            f"{path.name} did not open within {deadline_s:.0f} s.", _AGAIN
        ) from slow
    if done.returncode == 3:
        reason = done.stdout.decode("utf-8", errors="replace")
        raise ModelFilesError(f"{path.name} is damaged: {reason:.200}", _AGAIN)
    if done.returncode != 0:
        raise ModelFilesError(
            f"{path.name} cannot be used: opening it took more than {cpu_s:.0f} s of computing or"
            f" {MEMORY_BYTES >> 30} GiB, or crashed (code {done.returncode}).",
            _AGAIN,
        )
