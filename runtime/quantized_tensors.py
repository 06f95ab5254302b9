"""One quantised weight of a checkpoint: the tensors it is packed in, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.formats import Form
from runtime.safetensors_files import TensorEntry
from runtime.weight_forms import Codes, dequantise

_STORED: dict[str, Any] = {
    "F8_E4M3": np.uint8,
    "F8_E8M0": np.uint8,
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
}


@dataclass(frozen=True)
class QuantisedTensor:
    """One quantised weight: `shape` is (outputs, inputs), or (experts, outputs, inputs).

    `sources` are the tensors that make it up; `unpack` turns those of one matrix, typed and
    shaped, into its codes, a few rows at a time where something has to be made of them. Floats
    reach it as float32, those of eight bits as bytes.
    """

    name: str
    shape: tuple[int, ...]
    form: Form
    sources: tuple[TensorEntry, ...]
    unpack: Callable[..., Iterable[Codes]]

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

    def codes(self, raw: Sequence[NDArray[np.uint8]]) -> Iterable[Codes]:
        """Return the codes of one matrix, rows below each other, from what `inputs` names.

        They may be views of `raw`.
        """
        fused = len(self.shape) == 3
        typed = [
            _typed(data, source.stored).reshape(source.shape[1:] if fused else source.shape)
            for source, data in zip(self.sources, raw, strict=True)
        ]
        return self.unpack(*typed)

    def dequantised(self, raw: Sequence[NDArray[np.uint8]], dtype: torch.dtype) -> Tensor:
        """Return the plain matrix, computed some rows at a time to save memory."""
        result = torch.empty(self.shape, dtype=dtype)
        begin = 0
        for codes in self.codes(raw):
            for some in codes.in_pieces(self.shape[1]):
                result[begin : begin + some.rows] = dequantise(some, dtype)
                begin += some.rows
        return result


def _typed(data: NDArray[np.uint8], stored: str) -> NDArray[Any]:
    """Return numbers that are stored so: floats of two bytes as float32, those of one as bytes."""
    if stored == "BF16":
        wide: NDArray[Any] = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
        return wide.view(np.float32)
    if stored == "F16":
        # Only those who unpack wait for numba to be imported.
        from runtime.gguf_loops import halves

        wide = np.empty(data.size // 2, np.float32)
        halves(data, 2, 0, wide)
        return wide
    return data.view(_STORED[stored])


TensorTable = Mapping[str, TensorEntry | QuantisedTensor]
