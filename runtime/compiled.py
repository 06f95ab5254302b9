"""Compiling a loop over numbers: numba, with its result kept beside the source like Python's own.

What is compiled stays plain Python that can be run and read as it is. A compiled function may call
only compiled functions of its own file: a kept result is thrown away when that file changes, not
when another does. One is compiled as it is called first, so call it once before time counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compile a function of numbers and arrays; it does not hold the interpreter's lock."""
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # nowhere to keep the result: neither beside the source nor at home
        return cast(F, numba.njit(nogil=True)(function))
