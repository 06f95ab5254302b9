"""Compiling a loop over numbers: numba, with its result kept beside the source like Python's own.

What is compiled stays plain Python that can be run and read as it is. A compiled function may call
only compiled functions of its own file: a kept result is thrown away when that file changes, not
when another does. One is compiled as it is called first, so call it once before time counts.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar, cast

import numba
from numba.core.caching import FunctionCache

F = TypeVar("F", bound=Callable[..., object])


_UNREADABLE = (
    OSError,
    EOFError,
    pickle.UnpicklingError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What reading a file that was cut short, or writing to a full disk, may raise."""


class _Kept(FunctionCache):
    """What was compiled before, if it can be read; what cannot is compiled, and kept, anew."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except _UNREADABLE:
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with suppress(*_UNREADABLE):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def compiled(function: F) -> F:
    """Compile a function of numbers and arrays; it does not hold the interpreter's lock."""
    dispatcher: Any = numba.njit(nogil=True)(function)
    with suppress(RuntimeError):  # nowhere to keep results: neither beside the source nor at home
        dispatcher._cache = _Kept(function)  # type: ignore[no-untyped-call]
    return cast(F, dispatcher)
