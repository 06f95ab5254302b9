"""LLVM code of fused products: decodes fp8 or mxfp4 rows in registers and multiplies as it goes.

A number's bits are shifted to where float16 has sign, exponent and mantissa, because conversion
from float16 is one instruction on every CPU of interest, exact, and as fast for subnormal numbers
as for others. What float16's larger bias leaves missing is a power of two and is made good once
per row. Vectors are spelt out lane by lane, with every sum in a fixed order, and nothing may be
reordered: a row's bits depend on no tile, thread or alignment, nor on the tokens beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from runtime.kernels_fused_job import STEP_COLUMNS, TILE_ROWS, Job, Kind
from runtime.kernels_llvm import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    POINTER,
    Value,
    bfloat16,
    everywhere,
    fma,
    from_float16,
    function,
    int64,
    intrinsic,
    load,
    loop,
    pointer,
    same,
    smaller,
    sum_of_lanes,
    vector,
    whole_steps,
)
from runtime.weight_forms import MXFP4_COLUMNS, MXFP4_VALUES

TASK = "task"
STEP_BYTES = LANES
"""A row is decoded so many bytes at a time."""
_AT_ONCE = ((4, 4), (2, 4), (1, 8))
"""Tokens and rows that share what is in registers; the fastest of those tried."""
_TABLE_LOOKUP = f"llvm.x86.avx512.permvar.sf.{32 * LANES}"


def module(kind: Kind, avx512: bool) -> ir.Module:
    """Return a module with the function `kind`, from a pointer to a job to nothing.

    It works off tiles until there are none left; any number of threads may call it with one job.
    `TASK` is the same behind two pointers that it ignores. `avx512` allows that instruction set's
    look-up for mxfp4: the same bits, half the instructions.
    """
    made = ir.Module(kind)
    decoder = _decoder(kind, avx512)
    tiles = {
        shape: _Tile(made, decoder, *shape).function
        for tokens, rows in _AT_ONCE
        for shape in ((tokens, rows), (tokens, 1))
    }
    b = function(made, kind, [])
    (job,) = b.function.args
    all_rows, all_tokens = _field(b, job, "rows"), _field(b, job, "tokens")
    following, working, done = (b.append_basic_block() for _ in range(3))
    b.branch(following)
    b.position_at_end(following)
    # A tile to whoever asks: fast and slow cores, and those that others keep busy, end together.
    first = b.mul(b.atomic_rmw("add", job, int64(1), "monotonic"), int64(TILE_ROWS))
    b.cbranch(b.icmp_unsigned("<", first, all_rows), working, done)
    b.position_at_end(working)
    last = smaller(b, b.add(first, int64(TILE_ROWS)), all_rows)
    token = int64(0)
    for tokens, rows in _AT_ONCE:

        def all_of_tile(at: Value, tokens: int = tokens, rows: int = rows) -> None:
            row = first
            for count in (rows, 1):
                tile = tiles[tokens, count]

                def tile_of_token(at_row: Value, tile: Value = tile) -> None:
                    b.call(tile, [job, at_row, at])

                row = whole_steps(b, row, last, count, tile_of_token)

        token = whole_steps(b, token, all_tokens, tokens, all_of_tile)
    b.branch(following)
    b.position_at_end(done)
    b.ret_void()
    task = function(made, TASK, [POINTER, POINTER])
    task.call(b.function, [task.function.args[2]])
    task.ret_void()
    return made


@dataclass(frozen=True)
class _Decoder:
    """What is special about a kind.

    `numbers` and `activations` return vectors of float32 that belong together: decoded from
    `STEP_BYTES` at a pointer, and the bfloat16 at another; `step_columns` says how many. Numbers
    are too small by 2 ** `exponent`. `scale` reads one, by address of the first and index.
    `block_columns` is set where a kind knows nothing else.
    """

    step_columns: int
    block_columns: int | None
    exponent: int
    numbers: Callable[[ir.IRBuilder, Value], list[Value]]
    activations: Callable[[ir.IRBuilder, Value], list[Value]]
    scale: Callable[[ir.IRBuilder, Value, Value], Value]


def _decoder(kind: Kind, avx512: bool) -> _Decoder:
    if kind == "fp8":
        return _Decoder(STEP_COLUMNS, None, 8, _fp8, _in_order, _float_scale)
    numbers = _mxfp4_looked_up if avx512 else _mxfp4
    return _Decoder(2 * STEP_BYTES, MXFP4_COLUMNS, 14, numbers, _even_and_odd, _exponent_scale)


def _fp8(b: ir.IRBuilder, at: Value) -> list[Value]:
    """Decode e4m3; the exponent of its NaN is an ordinary one of float16, so that becomes 480."""
    bits = b.shl(b.sext(load(b, at, I8), vector(I16)), same(I16, 7))
    return [from_float16(b, b.and_(bits, same(I16, 0xBF80)))]


def _mxfp4(b: ir.IRBuilder, at: Value) -> list[Value]:
    """Decode e2m1: first the low nibbles, which are even columns, then the high ones."""
    bits = b.sext(load(b, at, I8), vector(I16))
    low = b.ashr(b.shl(bits, same(I16, 12)), same(I16, 3))
    high = b.shl(bits, same(I16, 5))
    return [from_float16(b, b.and_(each, same(I16, 0x8E00))) for each in (low, high)]


def _mxfp4_looked_up(b: ir.IRBuilder, at: Value) -> list[Value]:
    """Decode the same from a register that holds all 16 numbers; lanes look at four bits only."""
    bits = b.zext(load(b, at, I8), vector(I32))
    table = ir.Constant(vector(F32), [value * 2.0**-14 for value in MXFP4_VALUES])
    nibbles = (bits, b.lshr(bits, same(I32, 4)))
    return [intrinsic(b, _TABLE_LOOKUP, table, each) for each in nibbles]


def _in_order(b: ir.IRBuilder, at: Value) -> list[Value]:
    """Load 16 activations: bfloat16 is the upper half of a float32."""
    wide = b.zext(load(b, at, I16), vector(I32))
    return [b.bitcast(b.shl(wide, same(I32, 16)), vector(F32))]


def _even_and_odd(b: ir.IRBuilder, at: Value) -> list[Value]:
    """Load 32 activations as pairs, and take them apart without moving any to another lane."""
    pairs = load(b, at, I32)
    even, odd = b.shl(pairs, same(I32, 16)), b.and_(pairs, same(I32, 0xFFFF0000))
    return [b.bitcast(each, vector(F32)) for each in (even, odd)]


def _float_scale(b: ir.IRBuilder, scales: Value, index: Value) -> Value:
    return b.load(pointer(b, scales, b.mul(index, int64(4))), typ=F32, align=1)


def _exponent_scale(b: ir.IRBuilder, scales: Value, index: Value) -> Value:
    """Read e8m0; 2 ** -127, which only blocks of zeros have, becomes 0."""
    exponent = b.zext(b.load(pointer(b, scales, index), typ=I8, align=1), I32)
    return b.bitcast(b.shl(exponent, ir.Constant(I32, 23)), F32)


class _Tile:
    """The code for a few rows times a few tokens, from a given row and token on."""

    def __init__(self, made: ir.Module, decoder: _Decoder, tokens: int, rows: int) -> None:
        self._decoder = decoder
        self._b = b = function(made, f"tile_{tokens}_{rows}", [I64, I64])
        self.function = b.function
        self.function.linkage = "internal"
        job, row, token = self.function.args
        self._job = {each[0]: _field(b, job, each[0]) for each in Job._fields_}
        if decoder.block_columns is not None:
            self._job["block_columns"] = int64(decoder.block_columns)
        self._rows = [b.add(row, int64(each)) for each in range(rows)]
        self._tokens = [b.add(token, int64(each)) for each in range(tokens)]
        columns, row_bytes = self._job["columns"], self._in_bytes(self._job["columns"])
        self._numbers = [b.add(self._job["numbers"], b.mul(at, row_bytes)) for at in self._rows]
        token_bytes = b.mul(columns, int64(2))
        self._x = [b.add(self._job["x"], b.mul(at, token_bytes)) for at in self._tokens]
        self._zeros = [same(F32, 0.0)] * (rows * tokens)
        for number, total in enumerate(self._totals()):
            at_row, at_token = self._rows[number // tokens], self._tokens[number % tokens]
            at = b.mul(b.add(b.mul(at_token, self._job["rows"]), at_row), int64(2))
            result = b.fmul(sum_of_lanes(b, total), ir.Constant(F32, 2.0**decoder.exponent))
            b.store(bfloat16(b, result), pointer(b, self._job["out"], at), align=2)
        b.ret_void()

    def _totals(self) -> list[Value]:
        """Add up the blocks, each times its scale: by rows, and by tokens within."""
        b, decoder = self._b, self._decoder
        columns, width = self._job["columns"], self._job["block_columns"]
        blocks = b.udiv(b.add(columns, b.sub(width, int64(1))), width)
        first_scales = [b.mul(b.udiv(row, self._job["block_rows"]), blocks) for row in self._rows]

        def block(index: Value, totals: list[Value]) -> list[Value]:
            start = b.mul(index, width)
            stop = b.add(start, width)
            if decoder.block_columns is None:
                stop = smaller(b, stop, columns)
            sums = loop(b, start, stop, decoder.step_columns, self._zeros, self._step)
            scales = [
                everywhere(b, decoder.scale(b, self._job["scales"], b.add(first, index)))
                for first in first_scales
                for _ in self._tokens
            ]
            return [fma(b, *each) for each in zip(sums, scales, totals, strict=True)]

        return loop(b, int64(0), blocks, 1, self._zeros, block)

    def _step(self, column: Value, sums: list[Value]) -> list[Value]:
        """Add the products of the columns that `STEP_BYTES` hold."""
        b, decoder = self._b, self._decoder
        x_bytes, numbers_bytes = b.mul(column, int64(2)), self._in_bytes(column)
        x = [decoder.activations(b, pointer(b, at, x_bytes)) for at in self._x]
        added = []
        for row, at in enumerate(self._numbers):
            numbers = decoder.numbers(b, pointer(b, at, numbers_bytes))
            for token, activations in enumerate(x):
                total = sums[row * len(x) + token]
                for number, activation in zip(numbers, activations, strict=True):
                    total = fma(b, number, activation, total)
                added.append(total)
        return added

    def _in_bytes(self, columns: Value) -> Value:
        return self._b.udiv(columns, int64(self._decoder.step_columns // STEP_BYTES))


def _field(b: ir.IRBuilder, job: Value, name: str) -> Value:
    offset_bytes = int64(getattr(Job, name).offset)
    return b.load(b.gep(job, [offset_bytes], source_etype=I8), typ=I64)
