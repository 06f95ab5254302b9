"""Products with fp8 and mxfp4 matrices for a few tokens, decoded on the way, at memory speed.

torch multiplies with neither kind. The code is `runtime.kernels_fused_code`, compiled for this CPU
when the first matrix asks, in a fifth of a second, and never where no model needs it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from runtime import kernels_openmp
from runtime.formats import Matrix
from runtime.kernels_fused_job import STEP_COLUMNS, TILE_ROWS, Job, Kind
from runtime.weight_forms import MXFP4_COLUMNS

_NEEDED_OF_X86 = ("avx2", "fma", "f16c")

log = logging.getLogger("prescope.kernels")


def has_fused_product(matrix: Matrix) -> bool:
    """Say whether `multiply_fused` can take the matrix on this CPU. May compile."""
    columns, form = matrix.shape[1], matrix.form
    if form.kind == "mxfp4":
        fits = (form.rows, form.columns) == (1, MXFP4_COLUMNS) and not columns % MXFP4_COLUMNS
    else:
        fits = form.kind == "fp8" and form.scale_dtype == "float32"
        fits = fits and not columns % STEP_COLUMNS and not form.columns % STEP_COLUMNS
    return fits and _compiled(cast(Kind, form.kind)) is not None


def multiply_fused(matrix: Matrix, parts: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return `x` (t, inputs) times the transposed matrix: (t, outputs), both bfloat16 on the CPU.

    Products are exact in float32 and added up there, block by block; the result is rounded once.
    A row depends on nothing but its token, its row of the matrix and its scales: not on t, on
    threads, or on where anything lies. NaN of fp8 counts as 480, a scale of 2 ** -127 as 0.
    `has_fused_product(matrix)` must hold.
    """
    rows, columns = matrix.shape
    numbers, scales, x = parts[matrix.name], parts[f"{matrix.name}.scales"], x.contiguous()
    # Compiled code reads where it is told to: whatever could be wrong has to show before.
    assert x.shape[1] == columns, (x.shape, matrix)
    assert x.dtype == torch.bfloat16, x.dtype
    for part in (numbers, scales):
        assert part.is_contiguous(), matrix
        assert part.device.type == "cpu", matrix
    entry = _compiled(cast(Kind, matrix.form.kind))
    assert entry is not None, matrix
    out = torch.empty((x.shape[0], rows), dtype=torch.bfloat16)
    addresses = (each.data_ptr() for each in (numbers, scales, x, out))
    block = (matrix.form.rows, matrix.form.columns or columns)
    job = Job(0, *addresses, rows, columns, x.shape[0], *block)
    kernels_openmp.run(entry, ctypes.addressof(job), -(-rows // TILE_ROWS))
    return out


@functools.cache
def _compiled(kind: Kind) -> kernels_openmp.Entry | None:
    try:
        return compiled(kind, features_of_cpu())
    except (ImportError, OSError, RuntimeError) as error:
        log.warning(
            "The fast products with %s experts cannot be used: %s. They are computed on the CPU"
            " with torch's own operations, which takes several times as long.",
            kind,
            error,
        )
        return None


def features_of_cpu() -> dict[str, bool]:
    """Return which features LLVM knows this CPU to have, by LLVM's names.

    Raises:
        ImportError, OSError: llvmlite is not installed, or cannot be loaded.
        RuntimeError: it knows nothing of this CPU.
    """
    import llvmlite.binding as llvm

    return dict(llvm.get_host_cpu_features())


def compiled(kind: Kind, features: Mapping[str, bool]) -> kernels_openmp.Entry:
    """Compile the code for `kind` on this CPU, as if it had no more than `features`.

    Raises:
        ImportError, OSError: as `features_of_cpu`.
        RuntimeError: the code cannot be compiled, or would be slow.
    """
    import llvmlite.binding as llvm

    from runtime.kernels_fused_code import TASK, module

    triple = llvm.get_process_triple()
    on_x86 = triple.startswith("x86_64")
    if on_x86:
        lacking = [name for name in _NEEDED_OF_X86 if not features.get(name)]
        if lacking:
            raise RuntimeError(f"this CPU has no {' and no '.join(lacking)}")
    elif not triple.startswith(("aarch64", "arm64")):
        raise RuntimeError(f"they have not been written for {triple}")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    code = llvm.parse_assembly(str(module(kind, features.get("avx512f", False))))
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=",".join(f"{'+' if on else '-'}{name}" for name, on in features.items()),
        opt=3,
        reloc="static" if on_x86 else "default",
        jit=True,
    )
    builder = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
    builder.getModulePassManager().run(code, builder)
    engine = llvm.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    alone, task = (engine.get_function_address(name) for name in (kind, TASK))
    return kernels_openmp.Entry(alone, task, engine)
