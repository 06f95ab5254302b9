"""The dense weights of a model as transformers' loader asks for them: read when indexed.

Quantised ones are dequantised on the way, so that the model's linear layers are plain ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from runtime.adapter_recipes import Checkpoint
from runtime.core import LoadProgress
from runtime.errors import CancelledError, ModelError, UnsupportedModelError
from runtime.quantized_tensors import QuantisedTensor
from runtime.safetensors_files import READ_BYTES, SafetensorsFiles, TensorEntry
from runtime.store_recipes import bytes_in

_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_OTHER = "Choose a version of this model in bfloat16, float16 or float32."


class Stop(BaseException):
    """Carries an error of ours through transformers, which collects every `Exception`."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class DenseWeights:
    """Reads the dense tensors for transformers' loader threads, one at a time.

    `tensors` is what its loader takes for a state dict. Quantised weights become `dtype`.
    """

    def __init__(
        self,
        files: SafetensorsFiles,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._files = files
        self._dtype = dtype
        self._progress = progress
        self._cancelled = cancelled
        self._reading = threading.Lock()
        self._ended = False
        self._done_bytes = 0
        dense = [checkpoint.tensors[name] for name in checkpoint.dense]
        self.tensors = {entry.name: _LazyTensor(self, entry, dtype) for entry in dense}
        experts = sum(len(s.recipes) * s.format.size_bytes for s in checkpoint.sources)
        self._dense_bytes = sum(entry.size_bytes for entry in dense)
        self._total_bytes = self._dense_bytes + experts

    def read(self, entry: TensorEntry | QuantisedTensor) -> Tensor:
        """Return the whole tensor; for loader threads, so an error comes as `Stop`."""
        with self._reading:
            try:
                if not isinstance(entry, TensorEntry):
                    if isinstance(entry, QuantisedTensor) and len(entry.shape) != 2:
                        what = f"{entry.name} has the shape {entry.shape} and is quantised"
                        raise UnsupportedModelError(f"{what}, which cannot be run yet.", _OTHER)
                    raw = [self._bytes(*each).numpy() for each in entry.inputs()]
                    return entry.dequantised(raw, self._dtype)
                if entry.dtype is None:
                    raise UnsupportedModelError(
                        f"Tensor {entry.name} is stored as {entry.stored}, which cannot be run"
                        " yet.",
                        _OTHER,
                    )
                dtype: torch.dtype = getattr(torch, entry.dtype)
                return self._bytes(entry.name, 0, entry.size_bytes).view(dtype).view(entry.shape)
            except (ModelError, CancelledError) as error:
                raise Stop(error) from error

    def continued(self, step: LoadProgress) -> None:
        """Report the experts' progress as the rest of the whole."""
        self._report(step.text, self._dense_bytes + step.done_bytes)

    def end(self) -> None:
        """Wait for the read under way and let no other begin."""
        self._ended = True
        with self._reading:
            pass

    def _bytes(self, name: str, first: int, size: int) -> Tensor:
        raw = torch.empty(size, dtype=torch.uint8)
        for begin in range(0, size, READ_BYTES):
            self._ended = self._ended or self._cancelled()
            if self._ended:
                raise CancelledError("Loading was stopped.")
            piece = raw[begin : begin + READ_BYTES]
            self._files.read([(name, first + begin, bytes_in(piece))])
            self._done_bytes += piece.numel()
        self._report("Reading the dense weights", self._done_bytes)
        return raw

    def _report(self, text: str, done_bytes: int) -> None:
        self._progress(LoadProgress(text, done_bytes, self._total_bytes))


class _LazyTensor:
    """What transformers' loader expects of a tensor in a file: read when indexed."""

    def __init__(
        self, weights: DenseWeights, entry: TensorEntry | QuantisedTensor, dtype: torch.dtype
    ) -> None:
        self._weights = weights
        self._entry = entry
        self._stored = entry.stored if isinstance(entry, TensorEntry) else _STORED[dtype]

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._weights.read(self._entry)
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._stored
