"""Words for writing LLVM code with llvmlite: vectors of 16 lanes, loops that carry values, sums.

All take the builder `b` first and emit where it stands. Integers are 64 bits wide and without
sign; pointers are made from them. llvmlite has no types of its own, so values are `Any` here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

Value = Any

LANES = 16
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, POINTER = ir.FloatType(), ir.PointerType()
_FMA = f"llvm.fma.v{LANES}f32"


def vector(kind: Value) -> Value:
    """Return the type of 16 lanes of `kind`."""
    return ir.VectorType(kind, LANES)


def same(kind: Value, value: float) -> Value:
    """Return the constant vector with `value` in every lane."""
    return ir.Constant(vector(kind), [value] * LANES)


def int64(value: int) -> Value:
    """Return a constant."""
    return ir.Constant(I64, value)


def function(made: ir.Module, name: str, more: Sequence[Value]) -> ir.IRBuilder:
    """Begin a function from a pointer and arguments of the types `more` to nothing."""
    begun = ir.Function(made, ir.FunctionType(ir.VoidType(), [POINTER, *more]), name)
    return ir.IRBuilder(begun.append_basic_block())


def intrinsic(b: ir.IRBuilder, name: str, *arguments: Value) -> Value:
    """Call an LLVM intrinsic that returns a vector of float32."""
    known = b.module.globals.get(name)
    if known is None:
        kinds = [argument.type for argument in arguments]
        known = ir.Function(b.module, ir.FunctionType(vector(F32), kinds), name)
    return b.call(known, arguments)


def loop(
    b: ir.IRBuilder,
    start: Value,
    stop: Value,
    step: int,
    carried: Sequence[Value],
    body: Callable[[Value, list[Value]], list[Value]],
) -> list[Value]:
    """Emit `for index in range(start, stop, step): carried = body(index, carried)`."""
    before = b.block
    head, inside, after = (b.append_basic_block() for _ in range(3))
    b.branch(head)
    b.position_at_end(head)
    phis = []
    for value in (start, *carried):
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        phis.append(phi)
    index, *values = phis
    b.cbranch(b.icmp_unsigned("<", index, stop), inside, after)
    b.position_at_end(inside)
    results = [*body(index, values), b.add(index, int64(step))]
    for phi, result in zip((*values, index), results, strict=True):
        phi.add_incoming(result, b.block)
    b.branch(head)
    b.position_at_end(after)
    return values


def whole_steps(
    b: ir.IRBuilder, start: Value, stop: Value, step: int, body: Callable[[Value], None]
) -> Value:
    """Emit `body` for every whole step that fits, and return where the rest begins."""
    end = b.sub(stop, b.urem(b.sub(stop, start), int64(step)))

    def once(index: Value, carried: list[Value]) -> list[Value]:
        body(index)
        return carried

    loop(b, start, end, step, [], once)
    return end


def pointer(b: ir.IRBuilder, start: Value, offset_bytes: Value) -> Value:
    """Return the pointer to `offset_bytes` after the address `start`."""
    return b.inttoptr(b.add(start, offset_bytes), POINTER)


def load(b: ir.IRBuilder, at: Value, kind: Value) -> Value:
    """Load 16 lanes of `kind` from anywhere; alignment changes nothing but speed."""
    return b.load(at, typ=vector(kind), align=1)


def smaller(b: ir.IRBuilder, one: Value, other: Value) -> Value:
    """Return the smaller of two integers."""
    return b.select(b.icmp_unsigned("<", one, other), one, other)


def from_float16(b: ir.IRBuilder, bits: Value) -> Value:
    """Return the float32 numbers that 16 lanes of 16 bits stand for."""
    return b.fpext(b.bitcast(bits, vector(ir.HalfType())), vector(F32))


def fma(b: ir.IRBuilder, one: Value, other: Value, added: Value) -> Value:
    """Return `one * other + added`, rounded once."""
    return intrinsic(b, _FMA, one, other, added)


def everywhere(b: ir.IRBuilder, number: Value) -> Value:
    """Return `number` in every lane."""
    nothing = ir.Constant(vector(F32), ir.Undefined)
    one = b.insert_element(nothing, number, ir.Constant(I32, 0))
    return b.shuffle_vector(one, one, same(I32, 0))


def sum_of_lanes(b: ir.IRBuilder, lanes: Value) -> Value:
    """Add up all lanes, halves of what is left at a time."""
    half = LANES // 2
    while half:
        halves = [
            b.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(I32, half), [*places]))
            for places in (range(half), range(half, 2 * half))
        ]
        lanes = b.fadd(*halves)
        half //= 2
    return b.extract_element(lanes, ir.Constant(I32, 0))


def bfloat16(b: ir.IRBuilder, number: Value) -> Value:
    """Round a float32 to the nearest, ties to even; a NaN must not be rounded up to a number."""
    bits = b.bitcast(number, I32)
    odd = b.and_(b.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = b.add(bits, b.add(odd, ir.Constant(I32, 0x7FFF)))
    is_nan = b.fcmp_unordered("uno", number, number)
    rounded = b.select(is_nan, ir.Constant(I32, 0x7FC00000), rounded)
    return b.trunc(b.lshr(rounded, ir.Constant(I32, 16)), I16)
