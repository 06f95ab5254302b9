"""Opening a model folder: from files nobody vouches for to a model whose experts are elsewhere.

transformers builds the model and converts its dense weights, but opens no file: configuration,
weights and tokenizer are read here, checked first, from the given folder alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from runtime.adapter import (
    IMPLEMENTATION,
    MoeLayer,
    check_every_moe_layer_is_ours,
    find_moe_layers,
    stripped_experts,
)
from runtime.adapter_config import REFUSALS, build_skeleton, read_config, stored_dtype
from runtime.adapter_recipes import Checkpoint, sort_checkpoint
from runtime.adapter_shape import model_shape
from runtime.adapter_text import eos_token_ids, open_tokenizer
from runtime.core import LoadProgress, ModelShape
from runtime.errors import CancelledError, ModelFilesError, UnsupportedModelError
from runtime.safetensors_files import READ_BYTES, SafetensorsFiles, TensorEntry
from runtime.store import ExpertStore, bytes_in

_AGAIN = "Download the model again, or choose another one."


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run once its layers are attached to something that runs experts.

    `model` is in eval mode with all dense weights on its device and no expert weights; those are
    in `store`, which the owner of this record closes.
    """

    model: Any
    tokenizer: Any | None
    shape: ModelShape
    layers: tuple[MoeLayer, ...]
    store: ExpertStore
    context_tokens: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


def read_shape(folder: Path, dtype: torch.dtype | None = None) -> ModelShape:
    """Return the sizes of the model in `folder` without reading any weights.

    `dtype` None takes the dtype its configuration names.

    Raises:
        ModelFilesError: files are missing, damaged or do not fit each other.
        UnsupportedModelError: the family or format cannot be run here.
    """
    files = SafetensorsFiles(folder)
    try:
        config = read_config(folder)
        dtype = dtype or stored_dtype(config) or _most_common_dtype(files)
        skeleton = build_skeleton(config, dtype)
        layers = find_moe_layers(skeleton, dtype)
        sort_checkpoint(skeleton, layers, files.tensors)
        return model_shape(folder.name, skeleton, layers)
    finally:
        files.close()


def load_model(
    folder: Path,
    *,
    torch_device: torch.device,
    dtype: torch.dtype | None,
    allocate_host: Callable[[int], Tensor],
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
) -> LoadedModel:
    """Load the model in `folder`: dense weights to `torch_device`, experts to host slabs.

    `dtype` None takes the dtype its configuration names. `allocate_host(n)` returns `n` bytes of
    uint8 for a slab. `progress` and `cancelled` are called from this thread and from loader
    threads.

    Raises:
        ModelFilesError: files are missing, damaged or do not fit each other.
        UnsupportedModelError: the family or format cannot be run here.
        MemoryPlanError: there is not enough host memory.
        CancelledError: `cancelled` returned True; everything is given back.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress(LoadProgress("Looking at the model's files"))
    files = SafetensorsFiles(folder)
    try:
        config = read_config(folder)
        dtype = dtype or stored_dtype(config) or _most_common_dtype(files)
        tokenizer = open_tokenizer(folder, config.get_text_config().vocab_size)
        end_ids = eos_token_ids(folder, config, tokenizer)
        _check(cancelled)
        skeleton = build_skeleton(config, dtype)
        _check(cancelled)
        layers = find_moe_layers(skeleton, dtype)
        checkpoint = sort_checkpoint(skeleton, layers, files.tensors)
        _check(cancelled)
        shape = model_shape(folder.name, skeleton, layers)
        dense = _DenseWeights(files, checkpoint, shape, progress, cancelled)
        model = _load_dense(skeleton, config, dtype, torch_device, dense)
        layers = find_moe_layers(model, dtype)
        store = ExpertStore(
            files,
            checkpoint.sources,
            allocate_host=allocate_host,
            progress=dense.continued,
            cancelled=cancelled,
        )
    finally:
        files.close()
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        shape=shape,
        layers=tuple(layers),
        store=store,
        context_tokens=shape.context_tokens,
        eos_token_ids=end_ids,
        has_chat_template=tokenizer is not None and bool(tokenizer.chat_template),
    )


class _Stop(BaseException):
    """Carries an error of ours through transformers, which collects every `Exception`."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _DenseWeights:
    """Reads the dense tensors for transformers' loader threads, one at a time."""

    def __init__(
        self,
        files: SafetensorsFiles,
        checkpoint: Checkpoint,
        shape: ModelShape,
        progress: Callable[[LoadProgress], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._files = files
        self._progress = progress
        self._cancelled = cancelled
        self._reading = threading.Lock()
        self._ended = False
        self._done_bytes = 0
        self.tensors = {name: _LazyTensor(self, files.tensors[name]) for name in checkpoint.dense}
        experts = sum(len(s.recipes) * s.format.size_bytes for s in checkpoint.sources)
        self._dense_bytes = sum(files.tensors[name].size_bytes for name in checkpoint.dense)
        self._total_bytes = self._dense_bytes + experts

    def read(self, entry: TensorEntry) -> Tensor:
        if entry.dtype is None:
            raise _Stop(
                UnsupportedModelError(
                    f"Tensor {entry.name} is stored as {entry.stored}, which cannot be run yet.",
                    "Choose a version of this model in bfloat16, float16 or float32.",
                )
            )
        with self._reading:
            raw = torch.empty(entry.size_bytes, dtype=torch.uint8)
            for begin in range(0, entry.size_bytes, READ_BYTES):
                self._ended = self._ended or self._cancelled()
                if self._ended:
                    raise _Stop(CancelledError("Loading was stopped."))
                piece = raw[begin : begin + READ_BYTES]
                try:
                    self._files.read_into(entry.name, begin, bytes_in(piece))
                except ModelFilesError as error:
                    raise _Stop(error) from error
                self._done_bytes += piece.numel()
            self._report("Reading the dense weights", self._done_bytes)
        tensor: Tensor = raw.view(getattr(torch, entry.dtype)).view(entry.shape)
        return tensor

    def continued(self, step: LoadProgress) -> None:
        """Report the experts' progress as the rest of the whole."""
        self._report(step.text, self._dense_bytes + step.done_bytes)

    def end(self) -> None:
        """Wait for the read under way and let no other begin."""
        self._ended = True
        with self._reading:
            pass

    def _report(self, text: str, done_bytes: int) -> None:
        self._progress(LoadProgress(text, done_bytes, self._total_bytes))


class _LazyTensor:
    """What transformers' loader expects of a tensor in a file: read when indexed."""

    def __init__(self, weights: _DenseWeights, entry: TensorEntry) -> None:
        self._weights = weights
        self._entry = entry

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._weights.read(self._entry)
        return tensor if index is Ellipsis else tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        return self._entry.stored


def _load_dense(
    skeleton: Any,
    config: Any,
    dtype: torch.dtype,
    torch_device: torch.device,
    dense: _DenseWeights,
) -> Any:
    try:
        with stripped_experts(skeleton):
            model, info = type(skeleton).from_pretrained(
                None,
                config=config,
                state_dict=dense.tensors,
                dtype=dtype,
                device_map=None if torch_device.type == "cpu" else {"": torch_device},
                experts_implementation=IMPLEMENTATION,
                local_files_only=True,
                trust_remote_code=False,
                use_kernels=False,
                output_loading_info=True,
            )
    except _Stop as stop:
        raise stop.error from None
    except REFUSALS as error:
        what = f"The weights do not fit the {config.model_type} model: {error!s:.500}"
        raise ModelFilesError(what, _AGAIN) from error
    finally:
        dense.end()
    missing = sorted(info["missing_keys"])
    missing += [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if missing:
        raise ModelFilesError(
            f"The files lack {len(missing)} tensors of the model, among them {missing[0]}.", _AGAIN
        )
    check_every_moe_layer_is_ours(model)
    # Parameters keep requires_grad: matmul picks its kernel by it, and the last bit with it.
    return model.eval()


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise CancelledError("Loading was stopped.")


def _most_common_dtype(files: SafetensorsFiles) -> torch.dtype:
    sizes: dict[str, int] = {}
    for entry in files.tensors.values():
        if entry.dtype in ("float32", "bfloat16", "float16"):
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.size_bytes
    dtype: torch.dtype = getattr(torch, max(sizes, key=lambda name: sizes[name], default="float32"))
    return dtype
