"""One quantised weight of a checkpoint: the tensors it is packed in, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.formats import Form
from runtime.safetensors_files import TensorEntry
from runtime.weight_forms import Codes, dequantise

_RAW_DTYPES = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.uint8}
_DEQUANTISE_ITEMS = 2**20


@dataclass(frozen=True)
class QuantisedTensor:
    """One quantised weight: `shape` is (outputs, inputs), or (experts, outputs, inputs).

    `sources` are the tensors that make it up; `unpack` turns those of one matrix, typed and
    shaped, into its codes.
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    sources: tuple[TensorEntry, ...]
    unpack: Callable[..., Codes]

    @property
    def size_bytes(self) -> int:
        """Bytes in the files, all sources together."""
        return sum(source.size_bytes for source in self.sources)

    def inputs(self, expert: int = 0) -> tuple[tuple[str, int, int], ...]:
        """Return (tensor, first byte, bytes) of each source of one matrix."""
        share = self.shape[0] if len(self.shape) == 3 else 1
        sizes = [source.size_bytes // share for source in self.sources]
        return tuple(
            (source.name, expert * size, size)
            for source, size in zip(self.sources, sizes, strict=True)
        )

    def codes(self, raw: Sequence[Tensor]) -> Codes:
        """Return the codes of one matrix from the raw bytes that `inputs` names."""
        fused = len(self.shape) == 3
        typed = []
        for source, data in zip(self.sources, raw, strict=True):
            dtype = _RAW_DTYPES.get(source.stored) or getattr(torch, str(source.dtype))
            typed.append(data.view(dtype).view(source.shape[1:] if fused else source.shape))
        return self.unpack(*typed)

    def dequantised(self, raw: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the plain matrix, computed some rows at a time to save memory."""
        codes = self.codes(raw)
        outputs, columns = codes.codes.shape
        step = max(1, _DEQUANTISE_ITEMS // columns // codes.form.rows) * codes.form.rows
        result = torch.empty((outputs, columns), dtype=dtype)
        for begin in range(0, outputs, step):
            blocks = slice(begin // codes.form.rows, -(-(begin + step) // codes.form.rows))
            zeros = None if codes.zeros is None else codes.zeros[blocks]
            some = codes.codes[begin : begin + step]
            part = Codes(codes.form, some, codes.scales[blocks], zeros)
            result[begin : begin + step] = dequantise(part, dtype)
        return result


TensorTable = Mapping[str, TensorEntry | QuantisedTensor]
