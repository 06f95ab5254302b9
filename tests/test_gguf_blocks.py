"""GGUF blocks: every number equal to what two other programs make of the same bytes."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.integrations.gguf import dequant

from runtime import gguf_blocks
from runtime.formats import Matrix, lay_out
from runtime.gguf_blocks import FORMS, common_form, numbers_of, pieces, stacked, unpack, widened
from runtime.kernels import views
from runtime.weight_forms import dequantise, encode, held, memories, parts_of
from tests import unpacking_reference
from tests.gguf_writer import QUANTISED, TYPES, random_blocks

ROWS, COLUMNS = 6, 768


def raw_of(kind: str, seed: int = 0) -> Tensor:
    """Blocks like those of real files: scales of one size, any bits."""
    blocks = random_blocks(kind, (ROWS, COLUMNS), torch.Generator().manual_seed(seed))
    return torch.frombuffer(bytearray(blocks.content), dtype=torch.uint8)


def wild(kind: str, seed: int = 0) -> Tensor:
    """Blocks of any bits at all whose scales are finite."""
    generator = torch.Generator().manual_seed(seed)
    _, numbers, block_bytes, scales = TYPES[kind]
    shape = (ROWS * COLUMNS // numbers, block_bytes)
    raw = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    for offset in scales:
        raw[:, offset + 1] &= 0xBB  # No exponent of all ones: that is infinity or no number.
    if kind == "MXFP4":
        raw[:, 0].clamp_(2, 250)
    return raw.flatten()


def expected(kind: str, raw: Tensor) -> Tensor:
    """Return what somebody else's code makes of the blocks."""
    if kind in _ONE_BY_ONE:
        return _ONE_BY_ONE[kind](raw)
    return dequant.dequantize(raw, TYPES[kind][0]).view(-1, COLUMNS)


def _mxfp4(raw: Tensor) -> Tensor:
    """One number after another, as ggml's documentation of the type has it."""
    doubled = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
    numbers = []
    for block in raw.view(-1, 17).tolist():
        nibbles = [byte & 15 for byte in block[1:]] + [byte >> 4 for byte in block[1:]]
        numbers += [doubled[nibble] * 2.0 ** (block[0] - 128) for nibble in nibbles]
    return torch.tensor(numbers, dtype=torch.float64).float().view(-1, COLUMNS)


def _five_bits(raw: Tensor, size_bytes: int) -> Tensor:
    """One number after another: float16 scale (and minimum), 32 fifth bits, 32 nibbles."""
    numbers = []
    for block in raw.view(-1, size_bytes).numpy():
        scale = float(block[:2].view(np.float16)[0])
        least = float(block[2:4].view(np.float16)[0]) if size_bytes == 24 else -16 * scale
        bits = int.from_bytes(block[-20:-16].tobytes(), "little")
        nibbles = [int(byte) & 15 for byte in block[-16:]] + [
            int(byte) >> 4 for byte in block[-16:]
        ]
        for place, nibble in enumerate(nibbles):
            numbers.append((nibble + 16 * (bits >> place & 1)) * scale + least)
    return torch.tensor(numbers, dtype=torch.float64).float().view(-1, COLUMNS)


# What transformers has no code for.
_ONE_BY_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "MXFP4": _mxfp4,
    "Q5_0": lambda raw: _five_bits(raw, 22),
    "Q5_1": lambda raw: _five_bits(raw, 24),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_all_numbers_are_those_of_the_file(kind: str) -> None:
    for raw in (raw_of(kind), raw_of(kind, 1)):
        codes = unpack(kind, raw.numpy(), COLUMNS)
        assert codes.numbers.shape == (ROWS, COLUMNS)
        numbers = dequantise(codes, torch.float32)
        assert 0.01 < numbers.std() < 0.1
        assert torch.equal(numbers, expected(kind, raw))
        assert torch.equal(numbers_of(kind, raw.numpy(), COLUMNS, torch.float32), numbers)
        rounded = numbers_of(kind, raw.numpy(), COLUMNS, torch.bfloat16)
        assert torch.equal(rounded, expected(kind, raw).to(torch.bfloat16))


@pytest.mark.parametrize("kind", QUANTISED)
def test_any_bits_at_all_stay_within_one_rounding_of_the_zero(kind: str) -> None:
    raw = wild(kind)
    codes = unpack(kind, raw.numpy(), COLUMNS)
    numbers, exact = dequantise(codes, torch.float32), expected(kind, raw)
    if codes.zeros is None or codes.form.kind == "int8":
        assert torch.equal(numbers, exact)
        return
    zeros = codes.zeros.repeat_interleave(32, 1).abs()
    assert ((numbers - exact).abs() <= 2.0**-23 * torch.maximum(zeros, exact.abs())).all()


@pytest.mark.parametrize("scale", ["any", "none", "infinite", "no number", "tiny"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_any_bits_at_all_are_what_the_reference_makes_of_them(kind: str, scale: str) -> None:
    raw = wild(kind, 3)
    _, numbers, block_bytes, places = TYPES[kind]
    halves = {"none": 0x8000, "infinite": 0xFC00, "no number": 0x7C01, "tiny": 0x8003}
    for place in places if scale in halves and kind != "MXFP4" else ():
        # Every third block, so that what is around it shows if it is touched.
        blocks = raw.view(-1, block_bytes)[::3]
        blocks[:, place], blocks[:, place + 1] = halves[scale] & 255, halves[scale] >> 8
    ours, theirs = (
        unpack(kind, raw.numpy(), COLUMNS),
        unpacking_reference.unpack(kind, raw, COLUMNS),
    )
    assert (ours.form, ours.apart) == (theirs.form, theirs.apart)
    assert torch.equal(ours.codes, theirs.codes)
    for one, other in ((ours.scales, theirs.scales), (ours.zeros, theirs.zeros)):
        if one is None or other is None:
            assert one is other
            continue
        # Bits, so that signs of zeros count; which number no number is does not.
        bits = one.view(torch.int32) == other.view(torch.int32)
        assert (bits | one.isnan() & other.isnan()).all()


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_reference_notices_a_changed_bit(kind: str) -> None:
    raw = raw_of(kind)
    raw[-1] ^= 8
    numbers = dequantise(unpack(kind, raw_of(kind).numpy(), COLUMNS), torch.float32)
    assert not torch.equal(numbers, expected(kind, raw))


@pytest.mark.parametrize("kind", QUANTISED)
def test_the_gguf_package_reads_the_same_numbers(kind: str) -> None:
    quants = pytest.importorskip("gguf.quants", reason="the gguf package is not installed")
    types = pytest.importorskip("gguf").GGMLQuantizationType
    raw = raw_of(kind)
    rows = raw.view(ROWS, -1).numpy()
    theirs = quants.dequantize(np.ascontiguousarray(rows), types[kind])
    numbers = dequantise(unpack(kind, raw.numpy(), COLUMNS), torch.float32)
    assert torch.equal(numbers, torch.from_numpy(theirs))


@pytest.mark.parametrize("kinds", list(itertools.combinations(QUANTISED, 2)), ids="-".join)
def test_matrices_of_two_types_share_a_form_without_losing_a_bit(kinds: tuple[str, str]) -> None:
    form = common_form(kinds)
    raws = [raw_of(kind, seed) for seed, kind in enumerate(kinds)]
    blocks = [unpack(k, raw.numpy(), COLUMNS) for k, raw in zip(kinds, raws, strict=True)]
    wide = [widened(each, form) for each in blocks]
    matrix = Matrix("m", (2 * ROWS, COLUMNS), form)
    layout = lay_out(parts_of(matrix), [matrix])
    separate = [expected(kind, raw) for kind, raw in zip(kinds, raws, strict=True)]
    for interleaved in (False, True):
        flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
        encode(stacked(wide, interleaved), matrix, memories(flat.numpy(), layout))
        numbers = dequantise(held(matrix, views(flat, layout)), torch.float32)
        gate, up = (numbers[0::2], numbers[1::2]) if interleaved else numbers.chunk(2)
        assert torch.equal(gate, separate[0])
        assert torch.equal(up, separate[1])


def test_no_type_needs_a_wider_form_than_its_own() -> None:
    for kind, form in FORMS.items():
        assert common_form([kind]) == common_form([kind, kind]) == form
    assert common_form(["Q4_0", "Q4_K"]).kind == "int4"


def test_a_large_matrix_is_unpacked_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = random_blocks("Q5_K", (150, 256), torch.Generator().manual_seed(0))
    raw = np.frombuffer(blocks.content, np.uint8)
    whole = numbers_of("Q5_K", raw, 256, torch.bfloat16)
    monkeypatch.setattr(gguf_blocks, "_PIECE_BYTES", 100)
    assert [len(codes.codes) for codes in pieces("Q5_K", raw, 256)] == [64, 64, 22]
    assert torch.equal(numbers_of("Q5_K", raw, 256, torch.bfloat16), whole)


def test_numbers_that_will_be_spread_come_in_smaller_pieces() -> None:
    raw = np.zeros(4096 * 2048 // 32 * 17, np.uint8)
    as_they_lie = [codes.rows for codes in pieces("MXFP4", raw, 2048)]
    spread = [codes.rows for codes in pieces("MXFP4", raw, 2048, spread=True)]
    assert sum(as_they_lie) == sum(spread) == 4096
    assert max(spread) * 2048 * 4 <= 2**19 < max(as_they_lie) * 2048 * 4


def test_a_scale_that_is_no_number_becomes_the_next_power_of_two() -> None:
    raw = raw_of("MXFP4")
    raw[0] = 255
    codes = unpack("MXFP4", raw.numpy(), COLUMNS)
    assert codes.scales[0, 0] == 2.0**127
    before = unpack("MXFP4", raw_of("MXFP4").numpy(), COLUMNS)
    assert torch.equal(codes.scales[0, 1:], before.scales[0, 1:])
    matrix = Matrix("m", (ROWS, COLUMNS), FORMS["MXFP4"])
    layout = lay_out(parts_of(matrix), [matrix])
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    encode(codes, matrix, memories(flat.numpy(), layout))
    assert torch.equal(held(matrix, views(flat, layout)).scales, codes.scales)
