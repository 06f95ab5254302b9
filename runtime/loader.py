"""Opening a model: from files nobody vouches for to a model whose experts are elsewhere.

transformers builds the model and converts its dense weights, but opens no file: configuration,
weights and tokenizer are read here, checked first, from the given folder alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from runtime.adapter_config import REFUSALS, build_skeleton, stored_dtype
from runtime.adapter_quantized import with_held_formats
from runtime.adapter_shape import model_shape
from runtime.config import model_name
from runtime.core import ExpertsWish, LoadProgress, ModelShape
from runtime.errors import CancelledError, MemoryPlanError, ModelFilesError
from runtime.loader_dense import DenseWeights, Stop
from runtime.loader_experts import HeldExperts, finish, hold_experts, naming, one_thread_each
from runtime.loader_source import open_source
from runtime.safetensors_files import SafetensorsFiles
from runtime.store import ExpertStore

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
    remarks: tuple[str, ...] = ()


def read_shape(
    folder: Path,
    dtype: torch.dtype | None = None,
    experts: ExpertsWish = "as stored",
    half: torch.dtype = torch.bfloat16,
) -> ModelShape:
    """Return the sizes of the model in `folder`, or a GGUF file, without reading any weights.

    `dtype` None takes the dtype its configuration names, and `half` for quantised weights of which
    it names float16.

    Raises:
        ModelFilesError: files are missing, damaged or do not fit each other.
        UnsupportedModelError: the family or format cannot be run here.
    """
    source = open_source(folder, half)
    try:
        dtype = dtype or stored_dtype(source.config) or _most_common_dtype(source.files)
        skeleton = build_skeleton(source.config, dtype)
        layers = find_moe_layers(skeleton, dtype)
        checkpoint = source.sort(skeleton, layers)
        wanted = hold_experts(layers, checkpoint.sources, experts)
        return _shape(source.name, skeleton, layers, wanted)
    finally:
        source.files.close()


def _shape(name: str, skeleton: Any, layers: Sequence[MoeLayer], wanted: HeldExperts) -> ModelShape:
    shape = model_shape(name, skeleton, with_held_formats(layers, wanted.sources))
    return replace(shape, reading_bytes=wanted.reading_bytes)


def load_model(
    folder: Path,
    *,
    torch_device: torch.device,
    dtype: torch.dtype | None,
    allocate_host: Callable[[int], Tensor],
    progress: Callable[[LoadProgress], None],
    cancelled: Callable[[], bool],
    experts: ExpertsWish = "as stored",
    kept: Path | None = None,
    release_host: Callable[[Tensor], None] = lambda block: None,
    ram_experts: int | None = None,
    half: torch.dtype = torch.bfloat16,
    shape: ModelShape | None = None,
) -> LoadedModel:
    """Load the model in `folder`, or a GGUF file: dense weights to `torch_device`, experts to
    host slabs.

    `dtype` and `half` are those of `read_shape`, and `shape` is what it returned, None: it is found
    again. `allocate_host(n)` returns `n` bytes of
    uint8 for a slab, and `release_host` gets it back; `ram_experts` is how many experts they hold,
    None: all. The files stay open as long as the store. `progress` and `cancelled` are called from
    this thread and from loader threads. Experts that are quantised on the way as `experts` asks are
    kept in the folder `kept`.

    Raises:
        ModelFilesError: files are missing, damaged or do not fit each other.
        UnsupportedModelError: the family or format cannot be run here.
        MemoryPlanError: there is not enough host memory.
        CancelledError: `cancelled` returned True; everything is given back.
    """
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    progress(LoadProgress("Looking at the model's files"))
    source = open_source(folder, half)
    files, config = source.files, source.config
    try:
        dtype = dtype or stored_dtype(config) or _most_common_dtype(files)
        tokenizer = source.tokenizer()
        end_ids = source.end_ids(tokenizer)
        _check(cancelled)
        skeleton = build_skeleton(config, dtype)
        _check(cancelled)
        layers = find_moe_layers(skeleton, dtype)
        checkpoint = source.sort(skeleton, layers)
        _check(cancelled)
        wanted = hold_experts(layers, checkpoint.sources, experts)
        checkpoint = replace(checkpoint, sources=wanted.sources)
        shape = shape or _shape(source.name, skeleton, layers, wanted)
        dense = DenseWeights(files, checkpoint, dtype, progress, cancelled)
        model = _load_dense(skeleton, config, dtype, torch_device, dense)
        held = with_held_formats(find_moe_layers(model, dtype), wanted.sources)
        reading = wanted.open(files, files.paths, folder, model_name(folder), kept, cancelled)
        with one_thread_each():
            store = ExpertStore(
                files,
                wanted.sources,
                source=reading,
                allocate_host=allocate_host,
                progress=naming(reading, dense.continued),
                cancelled=cancelled,
                release_host=release_host,
                ram_experts=ram_experts,
            )
            try:
                remarks = finish(reading, dense.continued, cancelled, ram_experts is None)
            except BaseException:
                store.close()
                raise
    except BaseException:
        files.close()
        raise
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        shape=shape,
        layers=held,
        store=store,
        context_tokens=shape.context_tokens,
        eos_token_ids=end_ids,
        has_chat_template=tokenizer is not None and bool(tokenizer.chat_template),
        remarks=(*wanted.remarks, *remarks),
    )


def _load_dense(
    skeleton: Any,
    config: Any,
    dtype: torch.dtype,
    torch_device: torch.device,
    dense: DenseWeights,
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
    except Stop as stop:
        raise stop.error from None
    except REFUSALS as error:
        if ran_out_of_memory(error):
            raise MemoryPlanError(
                f"There was no room for the dense weights: {error!s:.200}",
                "Close other programs, or choose a smaller model.",
            ) from None  # the error holds on to what was loaded so far
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


def ran_out_of_memory(error: BaseException) -> bool:
    """Say whether this is how torch or Python reports that an allocation failed."""
    # On the CPU torch has no type of its own for it.
    plain = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return plain or isinstance(error, (torch.OutOfMemoryError, MemoryError))


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
