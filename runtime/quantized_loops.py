"""The loops of `runtime.quantized_codes`, compiled: zeros beside packed numbers.

All integers here are unsigned: an index that may be negative costs a comparison per number and
keeps the loop from being vectorised.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.compiled import compiled

Words = NDArray[np.uint32]

_U, _W = np.uint64, np.uint32
_8 = _U(8)
_FOUR, _EIGHT, _FIFTEEN = _W(4), _W(8), _W(15)


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
