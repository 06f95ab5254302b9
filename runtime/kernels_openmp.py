"""The OpenMP threads that torch computes with, lent to code that is not torch's.

A second pool would fight with the first for the same cores. Whoever calls is one of the threads,
so there is nothing to wait for but work, and nothing that could lock.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

_LIBRARIES = {"win32": "libiomp5md.dll", "darwin": "libtorch_cpu.dylib"}
_LINUX = "libtorch_cpu.so"
"""Symbols are looked up in what a library links as well, except on Windows."""
_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@dataclass(frozen=True)
class Entry:
    """Addresses of native code, to be called with the address of a job, from any thread.

    `alone` takes the job; `task` takes two pointers that it ignores, and the job. `keeper` is
    whatever the code lives as long as.
    """

    alone: int
    task: int
    keeper: object


def run(entry: Entry, job: int, most_threads: int) -> None:
    """Call `entry` with the address `job` on as many threads as torch uses now, at once.

    Never on more than `most_threads`, and perhaps on fewer: the code must be content with one.
    The interpreter lock is not held meanwhile.
    """
    threads = min(torch.get_num_threads(), most_threads)
    start = _start() if threads > 1 else None
    if start is None:
        _CALL(entry.alone)(job)
    else:
        start(entry, job, threads)


@functools.cache
def _start() -> Callable[[Entry, int, int], None] | None:
    """Return what starts a team of threads; None where torch brings no OpenMP that we know."""
    library = Path(torch.__file__).parent / "lib" / _LIBRARIES.get(sys.platform, _LINUX)
    try:
        return starting(ctypes.CDLL(str(library)))
    except OSError:
        return None


def starting(library: ctypes.CDLL) -> Callable[[Entry, int, int], None] | None:
    """Return what starts a team of `library`'s threads, GNU's or LLVM's and Intel's."""
    if hasattr(library, "GOMP_parallel"):
        return functools.partial(_start_gnu, library)
    if hasattr(library, "__kmpc_fork_call"):
        return functools.partial(_start_llvm, library)
    return None


def _start_gnu(library: ctypes.CDLL, entry: Entry, job: int, threads: int) -> None:
    library.GOMP_parallel(
        ctypes.c_void_p(entry.alone), ctypes.c_void_p(job), ctypes.c_uint(threads), ctypes.c_uint(0)
    )


class _Ident(ctypes.Structure):
    """Where in a program a team starts, as LLVM's OpenMP wants it told."""

    _fields_ = [
        ("reserved_1", ctypes.c_int32),
        ("flags", ctypes.c_int32),
        ("reserved_2", ctypes.c_int32),
        ("reserved_3", ctypes.c_int32),
        ("place", ctypes.c_char_p),
    ]


_IDENT = _Ident(0, 2, 0, 0, b";PreScope;run;0;0;;")


def _start_llvm(library: ctypes.CDLL, entry: Entry, job: int, threads: int) -> None:
    here = ctypes.byref(_IDENT)
    thread = library["__kmpc_global_thread_num"](here)
    library["__kmpc_push_num_threads"](here, thread, threads)
    fork = library["__kmpc_fork_call"]
    # Stated, so that what follows is passed as variable arguments are, which differs on some CPUs.
    fork.argtypes = (ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p)
    fork(here, 1, ctypes.c_void_p(entry.task), ctypes.c_void_p(job))
