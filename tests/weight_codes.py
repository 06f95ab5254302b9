"""Random quantised matrices of every form, for tests."""

from __future__ import annotations

import torch

from runtime.formats import ExpertFormat, Form, Matrix, lay_out
from runtime.kernels import views
from runtime.weight_forms import Codes, encode, memories, parts_of

FORMS = {
    "int8 rows": Form("int8"),
    "int8 groups": Form("int8", 1, 32),
    "int8 zeros": Form("int8", 1, 32, zeros=True),
    "int4 groups of 32": Form("int4", 1, 32, zeros=True),
    "int4 groups of 64": Form("int4", 1, 64),
    "int4 groups of 16": Form("int4", 1, 16, zeros=True),
    "int4 rows": Form("int4", zeros=True),
    "fp8 blocks": Form("fp8", 128, 128),
    "fp8 rows": Form("fp8"),
    "mxfp4": Form("mxfp4", 1, 32),
}


def random_codes(form: Form, shape: tuple[int, int], seed: int = 0) -> Codes:
    """Draw codes for a matrix whose values are of the order of 1 / sqrt(columns)."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    blocks = (-(-rows // form.rows), -(-columns // (form.columns or columns)))
    size = columns**-0.5
    if form.kind == "int8":
        codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        size /= 64
    elif form.kind == "fp8":
        codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(0, 16, shape, generator=generator).to(torch.uint8)
        size /= 4
    scales = size * (0.5 + torch.rand(blocks, generator=generator))
    if form.kind == "mxfp4":
        scales = torch.exp2(scales.log2().round())
    zeros = size * torch.randn(blocks, generator=generator) if form.zeros else None
    return Codes(form, codes, scales, zeros)


def laid_out(
    codes: dict[str, Codes], plain: dict[str, torch.Tensor]
) -> tuple[ExpertFormat, torch.Tensor]:
    """Return the layout of an expert of these matrices and plain tensors, and its bytes."""
    matrices = [Matrix(name, _shape(held), held.form) for name, held in codes.items()]
    tensors = [part for matrix in matrices for part in parts_of(matrix)]
    for name, tensor in plain.items():
        tensors.append((name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
    layout = lay_out(tensors, matrices)
    flat = torch.full((layout.size_bytes,), 0xA5, dtype=torch.uint8)
    parts, places = views(flat, layout), memories(flat.numpy(), layout)
    for matrix in matrices:
        encode(codes[matrix.name], matrix, places)
    for name, tensor in plain.items():
        parts[name].copy_(tensor)
    return layout, flat


def _shape(codes: Codes) -> tuple[int, int]:
    rows, columns = codes.codes.shape
    return rows, columns
