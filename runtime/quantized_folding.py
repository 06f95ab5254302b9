"""A checkpoint's tensors as the model would name them: packed ones folded into one each.

`fold` replaces `x.qweight`, `x.qzeros` and `x.scales` by a single `x.weight` with its true shape,
and the other formats alike, so that whoever sorts tensors into a model need not know them.
Shapes are checked here; nothing is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from runtime import quantized_codes
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.formats import Form, FormKind
from runtime.quantized_schemes import Quantisation, Scheme
from runtime.quantized_tensors import QuantisedTensor, TensorTable
from runtime.safetensors_files import TensorEntry
from runtime.weight_forms import Codes

_AGAIN = "Download the model again, or choose another one."
_OTHER = "Choose a version of this model without act-order, or in bfloat16, FP8, AWQ or GGUF."
_FLOATS = ("F32", "BF16", "F16")


def fold(tensors: Mapping[str, TensorEntry], quantisation: Quantisation | None) -> TensorTable:
    """Return the tensors by the names that a model without quantisation has for them.

    Raises:
        ModelFilesError: a quantised tensor lacks its scales, or shapes do not fit each other.
    """
    if quantisation is None:
        return tensors
    folding = _Folding(tensors, quantisation)
    for name in tensors:
        folding.add(name)
    kept = {name: entry for name, entry in tensors.items() if name not in folding.used}
    return {**kept, **folding.folded}


class _Folding:
    def __init__(self, tensors: Mapping[str, TensorEntry], quantisation: Quantisation) -> None:
        self._tensors = tensors
        self._method = quantisation.method
        self._schemes = quantisation.schemes
        self.folded: dict[str, QuantisedTensor] = {}
        self.used: set[str] = set()

    def add(self, name: str) -> None:
        """Fold the quantised weight whose numbers are in tensor `name`, if that is one."""
        entry = self._tensors[name]
        read = self._reader_of(entry)
        if read is None:
            return
        if 0 in entry.shape:
            _wrong(entry, f"is empty: its shape is {entry.shape}")
        read()

    def _reader_of(self, entry: TensorEntry) -> Callable[[], None] | None:
        """Return what folds the weight whose numbers `entry` has, None if it has none."""
        stem, _, last = entry.name.rpartition(".")
        if self._method == "mxfp4" and entry.name.endswith("_blocks"):
            return partial(self._mxfp4, entry, entry.name.removesuffix("_blocks"))
        if self._method in ("awq", "gptq") and last == "qweight":
            return partial(self._packed_along_inputs, entry, stem)
        if self._method == "compressed-tensors" and last == "weight_packed":
            return partial(self._packed_along_outputs, entry, stem)
        one_by_one = self._method in ("fp8", "compressed-tensors")
        if one_by_one and entry.stored in ("F8_E4M3", "I8"):
            if entry.name.endswith("_zero_point"):
                return None
            return partial(self._plain, entry)
        return None

    def _plain(self, weight: TensorEntry) -> None:
        stem = weight.name.removesuffix(".weight")
        names = [f"{weight.name}_scale_inv", f"{weight.name}_scale"]
        if stem != weight.name:
            names += [f"{stem}.scale", f"{stem}.qscale_weight"]
        scales = self._needed(weight, *names)
        self._is_stored_as(scales, (*_FLOATS, "U8", "F8_E8M0"))
        if weight.stored == "I8" and self._method == "fp8":
            self._fp4(weight, scales)
            return
        if weight.stored == "I8" and len(weight.shape) != 2:
            _wrong(weight, f"has the shape {weight.shape} instead of (outputs, inputs)")
        zeros = self._tensors.get(f"{weight.name}_zero_point")
        fused = len(weight.shape) == 3
        if len(weight.shape) not in (2, 3) or (fused and scales.shape[:1] != weight.shape[:1]):
            _wrong(scales, f"has the shape {scales.shape} for a weight of {weight.shape}")
        kind: FormKind = "fp8" if weight.stored == "F8_E4M3" else "int8"
        fitting: list[Form] = []
        for scheme in self._schemes:
            block = _block_of(weight.shape[-2:], scales.shape[int(fused) :], scheme)
            if block is not None and (kind == "fp8") == scheme.floating and scheme.bits == 8:
                fitting.append(Form(kind, *block, zeros=scheme.zeros))
        form = self._only(weight, scales, fitting)
        sources = [weight, scales]
        if form.zeros:
            sources.append(self._needed(weight, f"{weight.name}_zero_point"))
            self._is_stored_as(sources[-1], ("I8",))
            if sources[-1].shape != scales.shape:
                _wrong(sources[-1], f"has the shape {sources[-1].shape}, not {scales.shape}")
        elif zeros is not None:
            self.used.add(zeros.name)
        self._fold(weight.name, weight.shape, form, sources, quantized_codes.plain)

    def _fp4(self, weight: TensorEntry, scales: TensorEntry) -> None:
        """MXFP4 beside FP8: two numbers to an int8, one scale to 32 of them."""
        self._is_stored_as(scales, ("U8", "F8_E8M0"))
        if len(weight.shape) != 2 or all(scheme.bits != 4 for scheme in self._schemes):
            _wrong(weight, f"of shape {weight.shape} fits no scheme of the quantization_config")
        outputs, inputs = weight.shape[0], 2 * weight.shape[1]
        if inputs % 32 or scales.shape != (outputs, inputs // 32):
            _wrong(scales, f"has the shape {scales.shape} for a weight of {(outputs, inputs)}")
        form = Form("mxfp4", 1, 32)
        sources = [weight, scales]
        self._fold(weight.name, (outputs, inputs), form, sources, quantized_codes.mxfp4)

    def _mxfp4(self, blocks: TensorEntry, base: str) -> None:
        scales = self._needed(blocks, f"{base}_scales")
        self._is_stored_as(blocks, ("U8",))
        self._is_stored_as(scales, ("U8", "F8_E8M0"))
        *lead, groups, width = blocks.shape if len(blocks.shape) in (3, 4) else (0, 0)
        if width != 16 or scales.shape != (*lead, groups):
            _wrong(scales, f"has the shape {scales.shape} for blocks of {blocks.shape}")
        form = Form("mxfp4", 1, 32)
        shape = (*lead, groups * 32)
        self._fold(base, shape, form, [blocks, scales], quantized_codes.mxfp4)

    def _packed_along_inputs(self, weight: TensorEntry, stem: str) -> None:
        (scheme,) = self._schemes
        scales = self._needed(weight, f"{stem}.scales")
        zeros = self._needed(weight, f"{stem}.qzeros")
        order = self._tensors.get(f"{stem}.g_idx")
        self._is_stored_as(weight, ("I32",))
        self._is_stored_as(scales, _FLOATS)
        self._is_stored_as(zeros, ("I32",))
        per_word = 32 // scheme.bits
        if len(weight.shape) != 2:
            _wrong(weight, f"has the shape {weight.shape} instead of two axes")
        inputs, outputs = weight.shape
        if self._method == "awq":
            outputs *= per_word
        else:
            inputs *= per_word
        groups = self._groups(weight, inputs, scheme)
        if inputs % 8:
            _wrong(weight, f"has {inputs} inputs, which is no multiple of 8")
        if scales.shape != (groups, outputs):
            _wrong(scales, f"has the shape {scales.shape} instead of {(groups, outputs)}")
        if outputs % per_word or zeros.shape != (groups, outputs // per_word):
            wanted = (groups, outputs // per_word)
            _wrong(zeros, f"has the shape {zeros.shape} instead of {wanted}")
        form = _int_form(scheme)
        sources = [weight, scales, zeros]
        name = f"{stem}.weight"
        if self._method == "awq":
            self._fold(name, (outputs, inputs), form, sources, quantized_codes.awq)
            return
        if order is not None:
            self._is_stored_as(order, ("I32", "I64"))
            if order.shape != (inputs,):
                _wrong(order, f"has the shape {order.shape} instead of {(inputs,)}")
            sources.append(order)
        unpack = partial(_gptq, name, form, scheme.zeros_less_one)
        self._fold(name, (outputs, inputs), form, sources, unpack)

    def _packed_along_outputs(self, weight: TensorEntry, stem: str) -> None:
        scales = self._needed(weight, f"{stem}.weight_scale")
        self._is_stored_as(weight, ("I32",))
        self._is_stored_as(scales, _FLOATS)
        if f"{stem}.weight_g_idx" in self._tensors:
            raise UnsupportedModelError(
                f"{stem} has its weights in the order of activations (act-order), which cannot be"
                " read.",
                _OTHER,
            )
        if len(weight.shape) != 2:
            _wrong(weight, f"has the shape {weight.shape} instead of two axes")
        outputs, words = weight.shape
        fitting = []
        for scheme in self._schemes:
            inputs = words * 32 // scheme.bits
            groups = inputs // scheme.columns if scheme.columns else 1
            per_row = scheme.columns == 0 and scales.shape == (outputs,)
            if scheme.floating or scheme.rows != 1:
                continue
            if per_row or scales.shape == (outputs, groups):
                fitting.append(_int_form(scheme))
        form = self._only(weight, scales, fitting)
        bits = 4 if form.kind == "int4" else 8
        inputs = words * 32 // bits
        groups = self._groups(weight, inputs, Scheme(bits, columns=form.columns))
        sources = [weight, scales]
        if form.zeros:
            zeros = self._needed(weight, f"{stem}.weight_zero_point")
            self._is_stored_as(zeros, ("I32",))
            wanted = (-(-outputs * bits // 32), groups)
            if zeros.shape != wanted:
                _wrong(zeros, f"has the shape {zeros.shape} instead of {wanted}")
            sources.append(zeros)
        self._fold(f"{stem}.weight", (outputs, inputs), form, sources, quantized_codes.packed)

    def _fold(
        self,
        name: str,
        shape: Sequence[int],
        form: Form,
        sources: Sequence[TensorEntry],
        unpack: Callable[..., Iterable[Codes]],
    ) -> None:
        if name in self._tensors and self._tensors[name] is not sources[0]:
            _wrong(sources[0], f"is there beside {name}")
        if 0 in shape:
            _wrong(sources[0], f"is empty: {name} would have the shape {tuple(shape)}")
        self.used |= {source.name for source in sources}
        if not isinstance(unpack, partial):
            unpack = partial(unpack, form)
        self.folded[name] = QuantisedTensor(name, tuple(shape), form, tuple(sources), unpack)

    def _groups(self, weight: TensorEntry, inputs: int, scheme: Scheme) -> int:
        columns = scheme.columns or inputs
        if inputs % columns:
            _wrong(weight, f"has {inputs} inputs, which groups of {columns} do not divide")
        return inputs // columns

    def _needed(self, weight: TensorEntry, *names: str) -> TensorEntry:
        for name in names:
            if name in self._tensors:
                return self._tensors[name]
        raise ModelFilesError(f"The files have {weight.name}, but no {names[0]}.", _AGAIN)

    def _is_stored_as(self, entry: TensorEntry, allowed: Sequence[str]) -> None:
        if entry.stored not in allowed:
            _wrong(entry, f"is stored as {entry.stored} instead of {' or '.join(allowed)}")

    def _only(self, weight: TensorEntry, scales: TensorEntry, fitting: Sequence[Form]) -> Form:
        found = list(dict.fromkeys(fitting))
        if len(found) != 1:
            fits = "no scheme" if not found else "more than one scheme"
            _wrong(
                scales,
                f"of shape {scales.shape}, for {weight.name} of shape {weight.shape}, fits {fits}"
                " of the quantization_config",
            )
        return found[0]


def _block_of(
    matrix: tuple[int, ...], grid: tuple[int, ...], scheme: Scheme
) -> tuple[int, int] | None:
    """Return rows and columns of a block, or None where scales of shape `grid` do not fit."""
    outputs, inputs = matrix
    rows, columns = scheme.rows or outputs, scheme.columns or inputs
    wanted = (-(-outputs // rows), -(-inputs // columns))
    shapes: list[tuple[int, ...]] = [wanted]
    if wanted[1] == 1:
        shapes.append(wanted[:1])
    if wanted == (1, 1):
        shapes.append(())
    if grid in shapes:
        return (min(rows, outputs), scheme.columns)
    if scheme.rows == 0 and grid in ((outputs,), (outputs, 1)):
        return (1, 0)
    return None


def _int_form(scheme: Scheme) -> Form:
    return Form("int4" if scheme.bits == 4 else "int8", 1, scheme.columns, scheme.zeros)


def _gptq(name: str, form: Form, zeros_less_one: bool, *typed: NDArray[Any]) -> Iterable[Codes]:
    weight, scales, zeros, *order = typed
    for groups in order:
        inputs = len(scales) * form.columns if form.columns else groups.size
        if not np.array_equal(groups, _in_order(inputs, form.columns or inputs)):
            raise UnsupportedModelError(
                f"{name} has its weights in the order of activations (act-order), which cannot be"
                " read.",
                _OTHER,
            )
    codes, symmetric = quantized_codes.gptq(form, weight, scales, zeros, zeros_less_one)
    if not (form.zeros or symmetric):
        raise ModelFilesError(
            f"{name} has zero points, but its quantization_config says sym.", _AGAIN
        )
    return codes


@functools.lru_cache(maxsize=8)
def _in_order(inputs: int, columns: int) -> NDArray[np.int32]:
    """Return the group of each input, as g_idx has it; kept because every matrix is asked."""
    groups: NDArray[np.int32] = np.arange(inputs, dtype=np.int32) // np.int32(columns)
    return groups


def _wrong(entry: TensorEntry, what: str) -> NoReturn:
    raise ModelFilesError(f"The files do not fit each other: {entry.name} {what}.", _AGAIN)
