"""Dense parameters of GGUF models: which tensors they are made of, and how their numbers lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runtime.gguf_blocks import FORMS, numbers_of
from runtime.gguf_files import logical_shape
from runtime.safetensors_files import TensorEntry


@dataclass(frozen=True)
class GgufWeight:
    """A dense parameter and the tensors it is made of; `arrange` gets their numbers, shaped."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[TensorEntry, ...]
    arrange: Callable[[Sequence[Tensor]], Tensor]

    @property
    def size_bytes(self) -> int:
        """Bytes in the files, all sources together."""
        return sum(source.size_bytes for source in self.sources)

    def inputs(self) -> tuple[tuple[str, int, int], ...]:
        """Return (tensor, first byte, bytes) of each source."""
        return tuple((source.name, 0, source.size_bytes) for source in self.sources)

    def dequantised(self, raw: Sequence[NDArray[np.uint8]], dtype: torch.dtype) -> Tensor:
        """Return the parameter from the bytes that `inputs` names; plain numbers keep their dtype.

        transformers casts those: it knows which parameters have to stay in float32.
        """
        pairs = zip(self.sources, raw, strict=True)
        return self.arrange([all_numbers(source, data, dtype) for source, data in pairs])


def row_numbers(entry: TensorEntry, row: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one expert's numbers from its row (1, ...) of the file's tensor."""
    if entry.stored not in FORMS:
        return row[0]
    return numbers_of(entry.stored, row.flatten().numpy(), logical_shape(entry)[-1], dtype)


def all_numbers(entry: TensorEntry, raw: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """Return a whole tensor's numbers from its bytes."""
    shape = logical_shape(entry)
    if entry.stored not in FORMS:
        stored: torch.dtype = getattr(torch, str(entry.dtype))
        return torch.from_numpy(raw).view(stored).view(shape)
    return numbers_of(entry.stored, raw, shape[-1], dtype).view(shape)
