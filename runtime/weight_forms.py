"""Quantised matrices of experts: what their numbers mean, and the parts that hold them in a slot.

`Codes` is the meaning, the same whatever file it came from. `parts_of`, `encode` and `held` are
the only places that know how it lies in memory, beside `runtime.weight_packing` and the kernels
that read it.

A matrix that torch's four-bit CPU op can multiply lies exactly as that op wants it: packed anew at
every use it would cost ten times the multiplication, and a card undoes the permutation in the pass
over the numbers that it makes anyway. The op's layout depends on the CPU, so bytes of a slot are
not portable between machines. Other matrices keep their rows; of two four-bit neighbours the first
is the low nibble.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.formats import ExpertFormat, Form, Matrix, ScaleDtype
from runtime.weight_packing import LARGEST_BLOCK, pack_eights, pack_into, turned, unpack

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_VALUES = (*_E2M1, *(-value for value in _E2M1))
MXFP4_COLUMNS = 32
_E8M0_BIAS = 127
_E8M0_LEAST_BITS = 0x00400000
"""2 ** -127 as a float32, which has no exponent of its own for it."""
_MANTISSA_BITS = 23
_DEQUANTISE_ITEMS = 2**20
_SPREAD_NUMBERS = 2**18
_PACKED_COLUMNS = (32, 64, 128, 256)
_PACKED_ROWS = 16
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which four bits of a word, counted from the lowest, each of its eight rows has."""
PIECE_ROWS = LARGEST_BLOCK
"""Rows of a matrix that is written in pieces begin at a multiple of this."""


@dataclass(frozen=True)
class Codes:
    """A quantised matrix (outputs N, inputs K): value(code) * scale of its block + its zero.

    Code and value by kind: int8: int8 (N, K), itself. int4: uint8 (N, K) of 0 to 15, code - 8.
    fp8: float8_e4m3fn (N, K), itself. mxfp4: uint8 (N, K) of 0 to 15, an e2m1 number.
    `scales` and `zeros`: float32 (ceil(N / rows), ceil(K / columns)); `zeros` None where the form
    has none.

    `codes` may be a view of a file's bytes with the rows first, (N, ...), as it lies there. Where
    `apart` is not 0 those hold two codes each: in runs of so many bytes, the low halves and then
    the high halves. With `eights` they are int32 (N / 8, K) as AWQ has them: the four bits of
    eight rows to a word, the even rows in the lower half.
    """

    form: Form
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    apart: int = 0
    eights: bool = False

    @property
    def rows(self) -> int:
        """How many outputs, N."""
        return self.codes.shape[0] * (8 if self.eights else 1)

    @property
    def numbers(self) -> Tensor:
        """The codes one by one, (N, K)."""
        if self.eights:
            words = self.codes.clone(memory_format=torch.contiguous_format)
            pairs = words.view(torch.uint8).view(*words.shape, 4)
            numbers = torch.empty((len(words), 8, words.shape[1]), dtype=torch.uint8)
            for row, place in enumerate(AWQ_PLACES):
                torch.bitwise_and(pairs[:, :, place // 2] >> place % 2 * 4, 15, out=numbers[:, row])
            return numbers.flatten(0, 1)
        if not self.apart:
            return self.codes.flatten(1)
        # `contiguous` may leave the strides of an axis of one as they are, and `view` minds them.
        words = self.codes.clone(memory_format=torch.contiguous_format)
        pairs = words.view(torch.uint8).view(len(words), -1, self.apart)
        if self.apart == 1:
            wide = pairs.flatten(1).to(torch.int16)
            return (wide | (wide << 4)).bitwise_and_(0x0F0F).view(torch.uint8)
        return torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)

    def in_pieces(self, columns: int, numbers: int | None = None) -> Iterator[Codes]:
        """Yield some rows at a time, of `columns` numbers: computing with them takes little.

        `numbers` says about how many; each piece but the last has a multiple of `PIECE_ROWS`.
        """
        height = math.lcm(self.form.rows, PIECE_ROWS)
        step = max(1, (numbers or _DEQUANTISE_ITEMS) // columns // height) * height
        for begin in range(0, self.rows, step):
            end = begin + step
            blocks = slice(begin // self.form.rows, -(-end // self.form.rows))
            codes = self.codes[begin // 8 : end // 8] if self.eights else self.codes[begin:end]
            zeros = None if self.zeros is None else self.zeros[blocks]
            yield replace(self, codes=codes, scales=self.scales[blocks], zeros=zeros)


def dequantise(codes: Codes, dtype: torch.dtype) -> Tensor:
    """Return the matrix (N, K) that `codes` stands for: computed in float32, rounded once."""
    kind = codes.form.kind
    if kind == "mxfp4":
        values = _mxfp4_values(codes.codes.device)[codes.numbers.int()]
    elif kind == "int4":
        values = codes.numbers.float().sub_(8)
    else:
        values = codes.numbers.float()
    rows, columns = values.shape
    width = codes.form.columns or columns
    if rows % codes.form.rows == 0 and columns % width == 0:
        # In place and without spreading the scales: one float32 matrix may take half a gigabyte.
        blocks = values.view(rows // codes.form.rows, codes.form.rows, columns // width, width)
        blocks.mul_(codes.scales[:, None, :, None])
        if codes.zeros is not None:
            blocks.add_(codes.zeros[:, None, :, None])
        return values.to(dtype)
    values = values * _spread(codes.scales, codes.form, rows, columns)
    if codes.zeros is not None:
        values = values + _spread(codes.zeros, codes.form, rows, columns)
    return values.to(dtype)


@functools.cache
def _mxfp4_values(device: torch.device) -> Tensor:
    return torch.tensor(MXFP4_VALUES, device=device)


def _spread(blocks: Tensor, form: Form, rows: int, columns: int) -> Tensor:
    wide = blocks.repeat_interleave(form.rows, 0)[:rows]
    return wide.repeat_interleave(form.columns or columns, 1)[:, :columns]


def form_for(form: Form, dtype: torch.dtype) -> Form:
    """Return `form` with scales no finer than weights of `dtype` would be.

    Rounding scales and zeros to bfloat16 moves a weight by at most 2 ** -8 of |scale * value| +
    |zero|, as rounding the dequantised weight does; the four-bit CPU op wants them so.
    """
    grouped = form.kind in ("int4", "int8") and form.rows == 1 and form.columns
    scale_dtype: ScaleDtype = "bfloat16" if grouped and dtype == torch.bfloat16 else "float32"
    return replace(form, scale_dtype=scale_dtype)


def is_packed(matrix: Matrix) -> bool:
    """Say whether the matrix lies as torch's four-bit CPU op reads it.

    An eight-bit one is then two four-bit matrices, `planes` of which the sum is the matrix.
    """
    (rows, columns), form = matrix.shape, matrix.form
    return (
        form.kind in ("int4", "int8")
        and form.rows == 1
        and form.columns in _PACKED_COLUMNS
        and columns % form.columns == 0
        and rows % _PACKED_ROWS == 0
    )


def parts_of(matrix: Matrix) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of the tensors that hold `matrix`, for `lay_out`."""
    (rows, columns), form = matrix.shape, matrix.form
    scales, zeros = f"{matrix.name}.scales", f"{matrix.name}.zeros"
    if is_packed(matrix):
        planes = 2 if form.kind == "int8" else 1
        groups: tuple[int, ...] = (columns // form.columns, rows)
        if form.zeros:
            groups = (*groups, 2)
        numbers = (matrix.name, (planes * rows, columns // 2), "uint8")
        return [numbers, (scales, groups, form.scale_dtype)]
    blocks = (-(-rows // form.rows), -(-columns // (form.columns or columns)))
    if form.kind == "mxfp4":
        return [(matrix.name, (rows, -(-columns // 2)), "uint8"), (scales, blocks, "uint8")]
    dtype = {"int8": "int8", "fp8": "float8_e4m3fn", "int4": "uint8"}[form.kind]
    width = -(-columns // 2) if form.kind == "int4" else columns
    parts: list[tuple[str, tuple[int, ...], str]] = [
        (matrix.name, (rows, width), dtype),
        (scales, blocks, form.scale_dtype),
    ]
    if form.zeros:
        parts.append((zeros, blocks, form.scale_dtype))
    return parts


def memories(flat: NDArray[np.uint8], layout: ExpertFormat) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of each part of one expert inside `flat`, which they share."""
    return {
        part.name: flat[part.offset_bytes : part.offset_bytes + part.size_bytes]
        for part in layout.parts
    }


def encode(
    codes: Codes, matrix: Matrix, parts: Mapping[str, NDArray[np.uint8]], first: int = 0
) -> None:
    """Write `codes` into the parts of `matrix`, as `memories` returns them.

    They may be some of its rows, from row `first` on: a multiple of `PIECE_ROWS` and of the form's
    rows, as their number is where more rows follow. The form of `codes` is that of `matrix` but
    for `scale_dtype`. Scales of mxfp4 must be powers of two from 2 ** -127 to 2 ** 127.
    """
    form = matrix.form
    assert codes.form.same_codes(form), (codes.form, matrix)
    assert first % PIECE_ROWS == first % form.rows == 0, (first, matrix)
    numbers, scales = parts[matrix.name], parts[f"{matrix.name}.scales"]
    rows, columns = matrix.shape
    if codes.eights and not is_packed(matrix):
        for some in codes.in_pieces(columns, _SPREAD_NUMBERS):
            encode(replace(some, codes=some.numbers, eights=False), matrix, parts, first)
            first += some.rows
        return
    if is_packed(matrix):
        begin, end = first * columns // 2, (first + codes.rows) * columns // 2
        planes = [numbers[begin:end]]
        if form.kind == "int8":
            # code == 16 * (high - 8) + low, both 0 to 15; the plane of the high ones comes first.
            half = rows * columns // 2
            planes = [numbers[half + begin : half + end], numbers[begin:end]]
        if codes.eights:
            pack_eights(codes.codes.numpy(), planes[0])
        else:
            pack_into(codes.codes.numpy(), planes, codes.apart, signed=form.kind == "int8")
        _write_groups(codes, form.scale_dtype, scales.reshape(columns // form.columns, -1), first)
        return
    _write_rows(_paired(codes) if form.kind in ("int4", "mxfp4") else codes.numbers, numbers, first)
    block = first // form.rows
    if form.kind == "mxfp4":
        _write_rows(_exponents(codes.scales), scales, block)
        return
    dtype: torch.dtype = getattr(torch, form.scale_dtype)
    _write_rows(codes.scales.to(dtype), scales, block)
    if codes.zeros is not None:
        _write_rows(codes.zeros.to(dtype), parts[f"{matrix.name}.zeros"], block)


def _write_rows(rows: Tensor, memory: NDArray[np.uint8], first: int) -> None:
    """Write rows of a part into its bytes, from row `first` on."""
    written = rows.contiguous().view(-1).view(torch.uint8).numpy()
    begin = first * rows[0].nbytes
    memory[begin : begin + written.size] = written


def held(matrix: Matrix, parts: Mapping[str, Tensor]) -> Codes:
    """Return the codes that `encode` wrote, scales and zeros rounded to the form's `scale_dtype`.

    Where that is not float32, dequantising gives another matrix than before by the bound that
    `form_for` states.
    """
    form, (rows, columns) = matrix.form, matrix.shape
    numbers, scales = parts[matrix.name], parts[f"{matrix.name}.scales"]
    zeros = None
    if is_packed(matrix):
        codes = unpack(numbers[:rows])
        if form.kind == "int8":
            codes = (codes << 4 | unpack(numbers[rows:])).view(torch.int8) - 128
        if form.zeros:
            scales, zeros = scales[..., 0], scales[..., 1].t().float()
        return Codes(form, codes, scales.t().float(), zeros)
    if form.kind in ("int4", "mxfp4"):
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=2).flatten(1)[:, :columns]
    if form.kind == "mxfp4":
        return Codes(form, numbers, torch.exp2(scales.float() - _E8M0_BIAS))
    if form.zeros:
        zeros = parts[f"{matrix.name}.zeros"].float()
    return Codes(form, numbers, scales.float(), zeros)


def _write_groups(codes: Codes, dtype: ScaleDtype, groups: NDArray[np.uint8], first: int) -> None:
    """Write scales, and zeros beside them, of rows from `first` on into (groups, bytes)."""
    # Only those who pack wait for numba to be imported.
    from runtime import weight_packing_loops as loops

    scales = codes.scales.numpy().view(np.uint32)
    zeros = scales if codes.zeros is None else codes.zeros.numpy().view(np.uint32)
    has_zeros, as_bfloat16 = codes.zeros is not None, dtype == "bfloat16"
    places = groups.view(f"u{(2 if as_bfloat16 else 4) << has_zeros}")
    if len(groups) != scales.shape[1] or first + len(scales) > places.shape[1]:
        # The loop checks nothing: this is what keeps it within its memory.
        where = f"rows {first} to {first + len(scales)}"
        raise ValueError(f"{where} of {scales.shape[1]} groups do not fit {places.shape}")
    if zeros.shape != scales.shape:
        raise ValueError(f"{zeros.shape} zeros for {scales.shape} scales")
    loops.write_groups(scales, zeros, has_zeros, as_bfloat16, first, places)


def _bytes_of(rows: Tensor) -> NDArray[np.uint8]:
    """Return the bytes of each row, (N, bytes), one after another in memory."""
    array = rows.numpy()
    if array.ndim == 3:
        # Runs of bytes with something else in between: copied as wholes, not byte by byte.
        array = array.view(f"V{array.shape[2] * array.itemsize}").squeeze(2)
    elif array.strides[1] != array.itemsize == 4:
        array = turned(array.view(np.uint32).T)
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(len(array), -1)


def _paired(codes: Codes) -> Tensor:
    """Return (N, ceil(K / 2)) bytes of two neighbouring codes each, the first one low."""
    if codes.apart == 1:
        return torch.from_numpy(_bytes_of(codes.codes))
    if codes.apart % 8 == 0 and codes.apart:
        pairs = _bytes_of(codes.codes).view(np.uint16)
        halves = (pairs & np.uint16(0x0F0F), pairs >> np.uint16(4) & np.uint16(0x0F0F))
        # Of each two bytes that hold one code the codes meet in the first.
        each = [(half | half >> np.uint16(4)).astype(np.uint8) for half in halves]
        runs = [half.view(f"V{codes.apart // 2}") for half in each]
        return torch.from_numpy(np.stack(runs, 2).view(np.uint8).reshape(len(pairs), -1))
    numbers = codes.numbers
    if numbers.shape[1] % 2:
        numbers = torch.nn.functional.pad(numbers, (0, 1))
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)


def _exponents(scales: Tensor) -> Tensor:
    """Return powers of two, float32, as mxfp4 holds them: uint8, 127 for 1."""
    bits = scales.contiguous().view(torch.int32)
    exponents = bits >> _MANTISSA_BITS
    powers = (exponents << _MANTISSA_BITS == bits) & (exponents > 0) & (exponents < 255)
    assert bool((powers | (bits == _E8M0_LEAST_BITS)).all()), "a scale of mxfp4 is no power of two"
    return exponents.to(torch.uint8)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return what uint8 `exponents` stand for as scales of mxfp4, float32.

    255 is no number, and the next power of two takes its place.
    """
    bits = exponents.clamp(max=254).int() << _MANTISSA_BITS
    return bits.masked_fill_(exponents == 0, _E8M0_LEAST_BITS).view(torch.float32)
