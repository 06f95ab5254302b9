"""The loops of `runtime.quantized_codes`, compiled: four-bit words of AWQ and GPTQ.

All integers here are unsigned: an index that may be negative costs a comparison per number and
keeps the loop from being vectorised. Temporary arrays are flat for the same reason: known strides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.compiled import compiled

Words = NDArray[np.uint32]

_U, _W = np.uint64, np.uint32
_LOW_NIBBLES, _LOW_BYTES, _LOW_PAIRS = _W(0x0F0F0F0F), _W(0x00FF00FF), _W(0x0000FFFF)
_0, _1, _2, _3, _4, _5, _6, _7, _8, _16 = (_U(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 16))
_FOUR, _EIGHT, _SIXTEEN, _FIFTEEN = _W(4), _W(8), _W(16), _W(15)


@compiled
def turn_words(words: Words, places: NDArray[np.uint64], begin: int, turned: Words) -> None:
    """Turn words of eight outputs (K, N / 8) into words of eight inputs: all of (K / 8, rows).

    The first row of `turned` is output number `begin`, a multiple of 8. `places` says which four
    bits of a word, counted from the lowest, each of its eight outputs has.
    """
    first, width = _U(begin) // _8, _U(turned.shape[1]) // _8
    square = np.empty(128, np.uint32)
    # By name: read from memory again for every word they would take half of the time.
    a, b, c, d = places[0] * _16, places[1] * _16, places[2] * _16, places[3] * _16
    e, f, g, h = places[4] * _16, places[5] * _16, places[6] * _16, places[7] * _16
    for eight in range(_U(turned.shape[0])):
        for start in range(_0, width, _16):
            count = min(_16, width - start)
            for k in range(_8):
                for w in range(count):
                    square[k * _16 + w] = words[eight * _8 + k, first + start + w]
            _turn_nibbles(square)
            for w in range(count):
                to = (start + w) * _8
                turned[eight, to], turned[eight, to + _1] = square[a + w], square[b + w]
                turned[eight, to + _2], turned[eight, to + _3] = square[c + w], square[d + w]
                turned[eight, to + _4], turned[eight, to + _5] = square[e + w], square[f + w]
                turned[eight, to + _6], turned[eight, to + _7] = square[g + w], square[h + w]


@compiled
def _turn_nibbles(words: Words) -> None:
    """Transpose the eight by eight nibbles of every column of `words`, (8, 16) but flat."""
    for w in range(_16):
        a, b, c, d = words[w], words[_16 + w], words[_2 * _16 + w], words[_3 * _16 + w]
        e, f, g, h = (
            words[_4 * _16 + w],
            words[_5 * _16 + w],
            words[_6 * _16 + w],
            words[_7 * _16 + w],
        )
        a, e = _exchanged(a, e, _SIXTEEN, _LOW_PAIRS)
        b, f = _exchanged(b, f, _SIXTEEN, _LOW_PAIRS)
        c, g = _exchanged(c, g, _SIXTEEN, _LOW_PAIRS)
        d, h = _exchanged(d, h, _SIXTEEN, _LOW_PAIRS)
        a, c = _exchanged(a, c, _EIGHT, _LOW_BYTES)
        b, d = _exchanged(b, d, _EIGHT, _LOW_BYTES)
        e, g = _exchanged(e, g, _EIGHT, _LOW_BYTES)
        f, h = _exchanged(f, h, _EIGHT, _LOW_BYTES)
        a, b = _exchanged(a, b, _FOUR, _LOW_NIBBLES)
        c, d = _exchanged(c, d, _FOUR, _LOW_NIBBLES)
        e, f = _exchanged(e, f, _FOUR, _LOW_NIBBLES)
        g, h = _exchanged(g, h, _FOUR, _LOW_NIBBLES)
        words[w], words[_16 + w], words[_2 * _16 + w], words[_3 * _16 + w] = a, b, c, d
        words[_4 * _16 + w], words[_5 * _16 + w] = e, f
        words[_6 * _16 + w], words[_7 * _16 + w] = g, h


@compiled
def _exchanged(first: Any, second: Any, bits: Any, lower: Any) -> tuple[Any, Any]:
    """Exchange the upper ones of `first`'s pairs of fields with the lower ones of `second`'s."""
    moved = ((first >> bits) ^ second) & lower
    return first ^ (moved << bits), second ^ moved


@compiled
def zeros_of(
    words: Words,
    places: NDArray[np.uint64],
    less_one: bool,
    scales: NDArray[np.float32],
    zeros: NDArray[np.float32],
) -> bool:
    """Write (8 - zero point) * scale into `zeros`, shaped like `scales`: (K / group, N).

    `words` (K / group, N / 8) holds zero points, one lower than they are if `less_one`; one of 0
    is then kept as 15. Says whether all of them are 8.
    """
    more = _W(1) if less_one else _W(0)
    all_eight = True
    for group in range(_U(words.shape[0])):
        for word in range(_U(words.shape[1])):
            packed = words[group, word]
            for output in range(_8):
                point = ((packed >> (_W(places[output]) * _FOUR)) + more) & _FIFTEEN
                all_eight &= point == _EIGHT
                at = word * _8 + output
                offset = np.float32(np.int64(8) - np.int64(point))
                zeros[group, at] = offset * scales[group, at]
    return all_eight
