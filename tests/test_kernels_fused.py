"""Products with fp8 and mxfp4 matrices: codes exactly, sums within their bound, always alike."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import kernels_fused, kernels_openmp
from runtime.formats import Form, Matrix
from runtime.kernels import views
from runtime.kernels_fused import compiled, features_of_cpu, has_fused_product, multiply_fused
from runtime.kernels_fused_code import module
from runtime.kernels_fused_job import Kind
from runtime.kernels_quantised import has_packed_op, multiply
from runtime.weight_forms import MXFP4_VALUES, Codes, dequantise
from tests.weight_codes import laid_out, random_codes

MXFP4 = Form("mxfp4", 1, 32)
FORMS = {
    "mxfp4": MXFP4,
    "fp8 blocks": Form("fp8", 128, 128),
    "fp8 small blocks": Form("fp8", 3, 48),
    "fp8 rows": Form("fp8"),
    "fp8 tensor": Form("fp8", 1000),
    "mxfp8": Form("fp8", 1, 32),
}
SHAPES = [(1, 32), (7, 64), (33, 96), (130, 352), (257, 160), (48, 2880)]


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def drawn(form: Form, shape: tuple[int, int]) -> tuple[Codes, Matrix, dict[str, Tensor]]:
    codes = random_codes(form, shape, 11)
    layout, flat = laid_out({"w": codes}, {})
    return codes, layout.matrices[0], views(flat, layout)


def activations(tokens: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn((tokens, columns), generator=generator).bfloat16()


def within_bound(actual: Tensor, codes: Codes, x: Tensor) -> bool:
    """Compare with the product in float64.

    A code times a bfloat16 has at most 12 bits, so products are exact. A product goes through as
    many roundings as its lane has additions in its block, then one per block (times the scale),
    four to add up 16 lanes, each at most 2 ** -24 of the sum of all sizes; then one to bfloat16,
    at most 2 ** -8.
    """
    rows, columns = codes.codes.shape
    width = codes.form.columns or columns
    roundings = -(-width // 16) + -(-columns // width) + 4
    numbers = dequantise(replace(codes, scales=torch.ones_like(codes.scales)), torch.float64)
    scales = codes.scales.double().repeat_interleave(codes.form.rows, 0)[:rows]
    weight = numbers * scales.repeat_interleave(width, 1)[:, :columns]
    exact = x.double() @ weight.t()
    sums = roundings * 2**-24 * (x.double().abs() @ weight.t().abs())
    bound = sums + 2**-8 * (exact.abs() + sums)
    return bool(((actual.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("name", FORMS)
def test_this_machine_has_the_products(name: str) -> None:
    matrix = drawn(FORMS[name], (7, 64))[1]
    assert has_fused_product(matrix)
    assert has_packed_op(matrix, torch.bfloat16)
    assert not has_packed_op(matrix, torch.float32)


@pytest.mark.parametrize("shape", [(64, 72), (64, 33)], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_odd_columns_are_left_to_torch(name: str, shape: tuple[int, int]) -> None:
    assert not has_fused_product(drawn(FORMS[name], shape)[1])


def test_scales_of_other_dtypes_are_left_to_torch() -> None:
    form = Form("fp8", 16, 16, scale_dtype="bfloat16")
    assert not has_fused_product(Matrix("w", (32, 32), form))
    assert not has_fused_product(Matrix("w", (32, 32), Form("fp8", 16, 8)))


def test_every_fp8_code_is_decoded_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    assert values.isnan().sum() == 2
    values[127], values[255] = 480.0, -480.0
    numbers = codes.unsqueeze(1).repeat(1, 16).view(torch.float8_e4m3fn)
    for scale in (1.0, 2.0**-100, 2.0**100):
        parts = {"w": numbers, "w.scales": torch.tensor([[scale]])}
        matrix = Matrix("w", (256, 16), Form("fp8", 256))
        product = multiply_fused(matrix, parts, torch.eye(16).bfloat16())
        assert torch.equal(product, (values * scale).bfloat16().expand(16, 256))


@pytest.mark.parametrize("exponent", [1, 2, 13, 14, 15, 60, 127, 200, 252, 253, 254])
def test_every_mxfp4_code_is_decoded_exactly_at_any_scale(exponent: int) -> None:
    numbers = (torch.arange(256, dtype=torch.uint8)).unsqueeze(1).repeat(1, 16)
    scales = torch.full((256, 1), exponent, dtype=torch.uint8)
    matrix, parts = Matrix("w", (256, 32), MXFP4), {"w": numbers, "w.scales": scales}
    product = multiply_fused(matrix, parts, torch.eye(32).bfloat16())
    values = torch.tensor(MXFP4_VALUES, dtype=torch.float64) * 2.0 ** (exponent - 127)
    low, high = torch.arange(256) & 15, torch.arange(256) >> 4
    expected = torch.stack([values[low], values[high]]).repeat(16, 1).float().bfloat16()
    assert torch.equal(product, expected)
    if exponent < 253:
        assert product.isfinite().all()


def test_the_smallest_mxfp4_scale_is_zero_and_that_of_nan_is_seen() -> None:
    numbers = torch.full((2, 16), 0x77, dtype=torch.uint8)
    scales = torch.tensor([[0], [255]], dtype=torch.uint8)
    matrix, parts = Matrix("w", (2, 32), MXFP4), {"w": numbers, "w.scales": scales}
    product = multiply_fused(matrix, parts, torch.ones(1, 32).bfloat16())
    assert product[0, 0] == 0
    assert not product[0, 1].isfinite()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FORMS)
def test_numbers_that_are_none_stay_visible(name: str, bad: float) -> None:
    _, matrix, parts = drawn(FORMS[name], (8, 64))
    x = activations(2, 64)
    x[1, 40] = bad
    product = multiply_fused(matrix, parts, x)
    assert product[0].isfinite().all()
    assert not product[1].isfinite().any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_products_are_within_their_bound(name: str, shape: tuple[int, int]) -> None:
    codes, matrix, parts = drawn(FORMS[name], shape)
    for tokens in (0, 1, 2, 3, 4, 7, 9):
        x = activations(tokens, shape[1])
        product = multiply_fused(matrix, parts, x)
        assert product.shape == (tokens, shape[0])
        assert product.dtype == torch.bfloat16
        assert within_bound(product, codes, x)
        assert torch.equal(product, multiply(matrix, parts, x, few_tokens=9))


def test_results_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    """Sums of two activations that float32 holds exactly; the bound above is too wide to tell."""
    x = torch.zeros((128, 32))
    x[:, 0] = 1 + torch.arange(128) / 128
    x[:, 1] = torch.arange(128) % 9 * 2.0**-10 * (-1) ** torch.arange(128)
    ones = {"w": torch.full((1, 16), 0x22, dtype=torch.uint8)}
    ones["w.scales"] = torch.tensor([[127]], dtype=torch.uint8)
    product = multiply_fused(Matrix("w", (1, 32), MXFP4), ones, x.bfloat16())
    assert torch.equal(product, x.sum(1, keepdim=True).bfloat16())


def _swapped_nibbles(parts: Mapping[str, Tensor]) -> None:
    parts["w"].copy_(parts["w"] << 4 | parts["w"] >> 4)


def _one_bit(parts: Mapping[str, Tensor]) -> None:
    parts["w"].view(torch.uint8)[5, 3] ^= 1


def _scales_of_next_row(parts: Mapping[str, Tensor]) -> None:
    parts["w.scales"].copy_(parts["w.scales"].roll(1, 0))


def _scales_of_next_column(parts: Mapping[str, Tensor]) -> None:
    parts["w.scales"].copy_(parts["w.scales"].roll(1, 1))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (_swapped_nibbles, "mxfp4"),
        (_one_bit, "mxfp4"),
        (_one_bit, "fp8 blocks"),
        (_scales_of_next_row, "mxfp4"),
        (_scales_of_next_row, "fp8 small blocks"),
        (_scales_of_next_column, "mxfp4"),
        (_scales_of_next_column, "fp8 blocks"),
    ],
)
def test_the_bound_notices(fault: Callable[[Mapping[str, Tensor]], None], name: str) -> None:
    codes, matrix, parts = drawn(FORMS[name], (33, 352))
    x = activations(3, 352)
    assert within_bound(multiply_fused(matrix, parts, x), codes, x)
    fault(parts)
    assert not within_bound(multiply_fused(matrix, parts, x), codes, x)


@pytest.mark.parametrize("name", FORMS)
def test_threads_change_no_bit(name: str, threads: Callable[[int], None]) -> None:
    _, matrix, parts = drawn(FORMS[name], (257, 352))
    x = activations(7, 352)
    threads(1)
    alone = multiply_fused(matrix, parts, x)
    for count in (2, 3, 5):
        threads(count)
        for _ in range(5):
            assert torch.equal(multiply_fused(matrix, parts, x), alone)


@pytest.mark.parametrize("name", FORMS)
def test_a_token_does_not_depend_on_others_nor_a_row_on_its_place(name: str) -> None:
    _, matrix, parts = drawn(FORMS[name], (39, 352))
    x = activations(11, 352)
    together = multiply_fused(matrix, parts, x)
    for tokens in range(1, 12):
        assert torch.equal(multiply_fused(matrix, parts, x[:tokens]), together[:tokens])
    if matrix.form.rows == 1:
        last = {part: tensor[-5:] for part, tensor in parts.items()}
        moved = multiply_fused(replace(matrix, shape=(5, 352)), last, x)
        assert torch.equal(moved, together[:, -5:])


@pytest.mark.parametrize("name", FORMS)
def test_where_things_lie_changes_no_bit(name: str) -> None:
    _, matrix, parts = drawn(FORMS[name], (39, 352))
    x = activations(3, 352)
    expected = multiply_fused(matrix, parts, x)

    def shifted(tensor: Tensor, offset: int) -> Tensor:
        raw = torch.zeros(tensor.numel() * tensor.element_size() + offset, dtype=torch.uint8)
        moved = raw[offset:].view(tensor.dtype).view(tensor.shape)
        return moved.copy_(tensor)

    for offset in (1, 3, 17):
        moved = {
            "w": shifted(parts["w"], offset),
            "w.scales": shifted(parts["w.scales"], 4 * offset),
        }
        assert torch.equal(multiply_fused(matrix, moved, shifted(x, 2 * offset)), expected)
    spread = torch.zeros((3, 704), dtype=torch.bfloat16)
    spread[:, ::2] = x
    assert torch.equal(multiply_fused(matrix, parts, spread[:, ::2]), expected)


@pytest.mark.parametrize("name", FORMS)
def test_instruction_sets_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AVX512 CPU decodes mxfp4 by look-up, and has registers for more."""
    _, matrix, parts = drawn(FORMS[name], (39, 352))
    x = activations(7, 352)
    expected = multiply_fused(matrix, parts, x)
    fewer = {key: on and "avx512" not in key for key, on in features_of_cpu().items()}
    entry = compiled(matrix.form.kind, fewer)  # type: ignore[arg-type]
    monkeypatch.setattr(kernels_fused, "_compiled", lambda kind: entry)
    assert torch.equal(multiply_fused(matrix, parts, x), expected)


class LlvmOpenMp:
    """Stands for LLVM's OpenMP library: runs the task on one thread and remembers the team."""

    def __init__(self) -> None:
        self.team = 0
        self.fork = self._Fork()

    class _Fork:
        argtypes: Any = None

        def __call__(self, ident: Any, count: int, task: Any, job: Any) -> None:
            assert count == 1
            thread = ctypes.byref(ctypes.c_int32(0))
            signature = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
            signature(task.value)(thread, thread, job)

    def _push(self, ident: Any, thread: int, threads: int) -> None:
        assert thread == 7
        self.team = threads

    def __getitem__(self, name: str) -> Any:
        return {
            "__kmpc_global_thread_num": lambda ident: 7,
            "__kmpc_push_num_threads": self._push,
            "__kmpc_fork_call": self.fork,
        }[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__kmpc"):
            return self[name]
        raise AttributeError(name)


def test_threads_of_llvms_openmp_can_be_used(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch brings on Windows; GNU's, which it brings on Linux, is used by all other tests."""
    _, matrix, parts = drawn(MXFP4, (257, 352))
    x = activations(3, 352)
    expected = multiply_fused(matrix, parts, x)
    library = LlvmOpenMp()
    start = kernels_openmp.starting(library)  # type: ignore[arg-type]
    monkeypatch.setattr(kernels_openmp, "_start", lambda: start)
    threads(4)
    assert torch.equal(multiply_fused(matrix, parts, x), expected)
    assert library.team == 4


def test_without_openmp_the_caller_works_alone(
    threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, matrix, parts = drawn(MXFP4, (257, 352))
    x = activations(3, 352)
    expected = multiply_fused(matrix, parts, x)
    assert kernels_openmp.starting(object()) is None  # type: ignore[arg-type]
    monkeypatch.setattr(kernels_openmp, "_start", lambda: None)
    threads(4)
    assert torch.equal(multiply_fused(matrix, parts, x), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="what torch brings on Linux")
def test_torchs_own_threads_are_found() -> None:
    assert kernels_openmp._start() is not None


def _missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("llvmlite", "llvmlite.binding"):
        monkeypatch.setitem(sys.modules, name, None)


def _weak_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_fused, "features_of_cpu", lambda: {"avx2": True, "fma": True})


@pytest.mark.parametrize(
    ("why", "said"), [(_missing, "llvmlite"), (_weak_cpu, "this CPU has no f16c")]
)
def test_what_cannot_be_compiled_is_left_to_torch_with_one_warning(
    why: Callable[[pytest.MonkeyPatch], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    codes, matrix, parts = drawn(MXFP4, (32, 64))
    why(monkeypatch)
    kernels_fused._compiled.cache_clear()
    try:
        assert not has_fused_product(matrix)
        assert not has_packed_op(matrix, torch.bfloat16)
        x = activations(2, 64)
        product = multiply(matrix, parts, x)
        exact = x.double() @ dequantise(codes, torch.float64).t()
        assert (product - exact).abs().max() < 0.02 * exact.abs().max()
    finally:
        kernels_fused._compiled.cache_clear()
    (record,) = caplog.records
    assert said in record.getMessage()


@pytest.mark.parametrize(
    "triple", ["x86_64-pc-windows-msvc", "arm64-apple-darwin", "aarch64-linux"]
)
@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_the_code_calls_nothing_on_other_platforms(kind: Kind, triple: str) -> None:
    """A symbol that only some libraries have would end the process when it is linked."""
    import llvmlite.binding as llvm

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    features = "+avx2,+fma,+f16c" if triple.startswith("x86") else ""
    machine = llvm.Target.from_triple(triple).create_target_machine(
        features=features, opt=3, reloc="static", codemodel="small"
    )
    code = llvm.parse_assembly(str(module(kind, avx512=False)))
    lines = machine.emit_assembly(code).splitlines()
    calls = [line.split()[1:] for line in lines if line.split()[:1] in (["callq"], ["bl"])]
    assert calls, "tiles are called"
    assert all(call[0].lstrip("_").startswith(("tile_", kind)) for call in calls), calls


def test_nothing_is_loaded_or_compiled_before_a_matrix_needs_it() -> None:
    program = """
import sys, torch
from runtime.formats import Form, Matrix
from runtime.kernels_quantised import has_packed_op
for form in (Form("int8"), Form("int4", 1, 32), Form("int4")):
    has_packed_op(Matrix("w", (64, 64), form), torch.bfloat16)
assert not has_packed_op(Matrix("w", (64, 64), Form("fp8")), torch.float32)
assert "llvmlite" not in sys.modules
assert has_packed_op(Matrix("w", (64, 64), Form("fp8")), torch.bfloat16)
assert "llvmlite" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
