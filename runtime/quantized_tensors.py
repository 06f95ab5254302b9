"""One quantised weight of a checkpoint: the tensors it is packed in, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

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
    shaped, into its codes, a few rows at a time where something has to be made of them.
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

    def codes(self, raw: Sequence[Tensor]) -> Iterable[Codes]:
        """Return the codes of one matrix, rows below each other, from what `inputs` names.

        They may be views of `raw`.
        """
        fused = len(self.shape) == 3
        typed = []
        for source, data in zip(self.sources, raw, strict=True):
            dtype = _RAW_DTYPES.get(source.stored) or getattr(torch, str(source.dtype))
            typed.append(data.view(dtype).view(source.shape[1:] if fused else source.shape))
        return self.unpack(*typed)

    def dequantised(self, raw: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the plain matrix, computed some rows at a time to save memory."""
        result = torch.empty(self.shape, dtype=dtype)
        begin = 0
        for codes in self.codes(raw):
            for some in _in_pieces(codes, self.shape[1]):
                rows = dequantise(some, dtype)
                result[begin : begin + len(rows)] = rows
                begin += len(rows)
        return result


def _in_pieces(codes: Codes, columns: int) -> Iterator[Codes]:
    height = codes.form.rows
    step = max(1, _DEQUANTISE_ITEMS // columns // height) * height
    for begin in range(0, len(codes.codes), step):
        blocks = slice(begin // height, -(-(begin + step) // height))
        zeros = None if codes.zeros is None else codes.zeros[blocks]
        some = codes.codes[begin : begin + step]
        yield replace(codes, codes=some, scales=codes.scales[blocks], zeros=zeros)


TensorTable = Mapping[str, TensorEntry | QuantisedTensor]
