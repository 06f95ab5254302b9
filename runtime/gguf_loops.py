"""The loops of `runtime.gguf_blocks`, compiled: scales, minima and numbers of ggml's blocks.

Each function reads `raw`, blocks one after another, and fills flat arrays in their order. Indices
are unsigned: one that may be negative costs a comparison and keeps a loop from being vectorised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.compiled import compiled

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Numbers = NDArray[np.int8]

_U, _F = np.uint64, np.float32
_0, _1, _2, _4, _8, _16, _32, _64 = (_U(n) for n in (0, 1, 2, 4, 8, 16, 32, 64))
_LOW_FOURS, _UPPER_TWOS, _LOW_SIXES = _U(0x0F0F0F0F), _U(0x30303030), _U(0x3F3F3F3F)
_EIGHT = np.float32(8)
_HALF_UNIT = np.float32(2.0**112)
"""What the bits of a float16, moved to where a float32 has them, have to be multiplied by."""


@compiled
def _widened(half: Any) -> Any:
    """Return the float32 of the bits of a float16."""
    size = np.uint32(half & np.uint32(0x7FFF))
    moved = np.uint32(size << np.uint32(13))
    bits = np.float32(moved.view(np.float32) * _HALF_UNIT).view(np.uint32)
    # Infinity, or no number, which is marked as quiet as processors do.
    bits = np.uint32(moved | np.uint32(0x7F800000)) if size >= np.uint32(0x7C00) else bits
    bits = np.uint32(bits | np.uint32(0x00400000)) if size > np.uint32(0x7C00) else bits
    sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(bits | sign).view(np.float32)


@compiled
def _half_bits(raw: Bytes, at: Any) -> Any:
    return np.uint32(np.uint32(raw[at]) | (np.uint32(raw[at + _1]) << np.uint32(8)))


@compiled
def _half(raw: Bytes, at: Any) -> Any:
    """Return the float16 at byte `at` as float32."""
    return _widened(_half_bits(raw, at))


@compiled
def halves(raw: Bytes, block_bytes: int, begin: int, out: Floats) -> None:
    """Read the float16 at byte `begin` of every block."""
    some = np.empty(64, np.uint32)
    for first in range(_0, _U(out.size), _64):
        # Collected first: what is done to them afterwards is vectorised.
        count = min(_64, _U(out.size) - first)
        for k in range(count):
            some[k] = _half_bits(raw, (first + k) * _U(block_bytes) + _U(begin))
        for k in range(count):
            out[first + k] = _widened(some[k])


@compiled
def scales_and_zeros(
    raw: Bytes, block_bytes: int, centred: bool, scales: Floats, zeros: Floats
) -> None:
    """Read the eight scales and zeros of every block of Q4_K and Q5_K.

    A block has six bits each, packed, for eight scales and minima, and the zero is what the number
    0 stands for: less the minimum, or if `centred` that of the number 8.
    """
    count = _U(scales.size) // _8
    packed = np.zeros(128, np.uint64)
    sixes = packed.view(np.uint8)
    bits, factors = np.zeros(128, np.uint32), np.empty(1024, np.float32)
    for first in range(_0, count, _64):
        # Collected first: what is done to them afterwards is vectorised.
        some = min(_64, count - first)
        for k in range(some):
            at = (first + k) * _U(block_bytes)
            bits[k], bits[_64 + k] = _half_bits(raw, at), _half_bits(raw, at + _2)
            low, high = _four_bytes(raw, at + _4), _four_bytes(raw, at + _8)
            both = _four_bytes(raw, at + _U(12))
            upper = (both & _LOW_FOURS) | ((low >> _2) & _UPPER_TWOS)
            packed[k] = (low & _LOW_SIXES) | (upper << _32)
            upper = ((both >> _4) & _LOW_FOURS) | ((high >> _2) & _UPPER_TWOS)
            packed[_64 + k] = (high & _LOW_SIXES) | (upper << _32)
        for k in range(_U(128)):
            factor = _widened(bits[k])
            for each in range(_8):
                factors[k * _8 + each] = factor
        for k in range(_U(1024)):
            factors[k] = factors[k] * _F(sixes[k])
        begin, minima = first * _8, _U(512)
        if centred:
            for k in range(some * _8):
                scales[begin + k] = factors[k]
                zeros[begin + k] = _EIGHT * factors[k] - factors[minima + k]
        else:
            for k in range(some * _8):
                scales[begin + k] = factors[k]
                zeros[begin + k] = -factors[minima + k]


@compiled
def _four_bytes(raw: Bytes, at: Any) -> Any:
    return (
        _U(raw[at])
        | (_U(raw[at + _1]) << _8)
        | (_U(raw[at + _2]) << _16)
        | (_U(raw[at + _U(3)]) << _U(24))
    )


@compiled
def iq4_xs_scales(raw: Bytes, scales: Floats) -> None:
    """Read the eight scales of every block of IQ4_XS: six bits each, packed."""
    for block in range(_U(scales.size) // _8):
        at = block * _U(136)
        scale = _half(raw, at)
        high = np.uint32(raw[at + _2]) | (np.uint32(raw[at + _U(3)]) << np.uint32(8))
        for k in range(_8):
            low = (np.uint32(raw[at + _4 + k // _2]) >> (np.uint32(k & _1) * np.uint32(4))) & 15
            six = low | (((high >> (np.uint32(k) * np.uint32(2))) & 3) << 4)
            scales[block * _8 + k] = scale * np.float32(np.int64(six) - 32)


@compiled
def q6_k_scales(raw: Bytes, scales: Floats) -> None:
    """Read the sixteen scales of every block of Q6_K: eight bits each, signed."""
    for block in range(_U(scales.size) // _16):
        at = block * _U(210)
        scale = _half(raw, at + _U(208))
        for k in range(_16):
            scales[block * _16 + k] = scale * np.float32(np.int8(raw[at + _U(192) + k]))


@compiled
def five_bits(raw: Bytes, block_bytes: int, begin: int, middle: int, numbers: Numbers) -> None:
    """Read the numbers of Q5_0 and Q5_1, less `middle`; their fifth bits are at byte `begin`."""
    less = np.uint8(middle)
    for block in range(_U(numbers.size) // _32):
        at, to = block * _U(block_bytes) + _U(begin), block * _32
        bits = np.uint32(0)
        for k in range(_4):
            bits |= np.uint32(raw[at + k]) << (np.uint32(k) * np.uint32(8))
        for k in range(_16):
            byte = raw[at + _4 + k]
            low = np.uint8((bits >> np.uint32(k)) & np.uint32(1)) << np.uint8(4)
            high = np.uint8((bits >> np.uint32(k + _16)) & np.uint32(1)) << np.uint8(4)
            numbers[to + k] = np.int8(np.uint8(np.uint8((byte & 15) | low) - less))
            numbers[to + _16 + k] = np.int8(np.uint8(np.uint8((byte >> 4) | high) - less))


@compiled
def q5_k(raw: Bytes, numbers: Numbers) -> None:
    """Read the numbers of Q5_K."""
    for block in range(_U(numbers.size) // _U(256)):
        at, to = block * _U(176), block * _U(256)
        for run in range(_4):
            shift = np.uint8(run * _2)
            for k in range(_32):
                byte, fifth = raw[at + _U(48) + run * _32 + k], raw[at + _16 + k] >> shift
                numbers[to + run * _64 + k] = np.int8((byte & 15) | ((fifth & 1) << 4))
                numbers[to + run * _64 + _32 + k] = np.int8((byte >> 4) | ((fifth & 2) << 3))


@compiled
def q6_k(raw: Bytes, numbers: Numbers) -> None:
    """Read the numbers of Q6_K."""
    for block in range(_U(numbers.size) // _U(256)):
        at, to = block * _U(210), block * _U(256)
        for run in range(_2):
            for k in range(_32):
                first = raw[at + run * _64 + k]
                second = raw[at + run * _64 + _32 + k]
                high = raw[at + _U(128) + run * _32 + k]
                place = to + run * _U(128) + k
                numbers[place] = np.int8((first & 15) | ((high & 3) << 4)) - 32
                numbers[place + _32] = np.int8((second & 15) | ((high & 12) << 2)) - 32
                numbers[place + _64] = np.int8((first >> 4) | (high & 48)) - 32
                numbers[place + _U(96)] = np.int8((second >> 4) | ((high & 192) >> 2)) - 32


@compiled
def stepped(
    raw: Bytes, block_bytes: int, begin: int, runs: int, steps: Numbers, numbers: Numbers
) -> None:
    """Read the numbers of IQ4_NL and IQ4_XS: nibbles, in runs of 16 bytes, that count `steps`."""
    run_numbers = _U(runs) * _32
    for block in range(_U(numbers.size) // run_numbers):
        for run in range(_U(runs)):
            at = block * _U(block_bytes) + _U(begin) + run * _16
            to = block * run_numbers + run * _32
            for k in range(_16):
                byte = raw[at + k]
                numbers[to + k] = steps[byte & 15]
                numbers[to + _16 + k] = steps[byte >> 4]
