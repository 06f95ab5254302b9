"""Small random checkpoints in the hub's own format, and the plainest ways to load and run them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from runtime.adapter import MoeLayer, attach
from runtime.core import ExpertId
from runtime.kernels import combine, views
from runtime.loader import LoadedModel, load_model
from runtime.store import ExpertStore


def auto_class(config: Any) -> Any:
    """Return the Auto class whose models write text for this configuration."""
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM
    return AutoModelForImageTextToText


def write_checkpoint(
    config: Any, folder: Path, dtype: str = "float32", max_shard_size: str = "5GB"
) -> None:
    """Save a random model whose routers and logits are far from degenerate."""
    config.dtype = dtype
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=getattr(torch, dtype))
    randomize(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)


def load_reference(folder: Path, config: Any, implementation: str = "eager") -> Any:
    """Load the same checkpoint with transformers alone, experts and all."""
    model = auto_class(config).from_pretrained(
        folder, dtype=config.dtype, experts_implementation=implementation, local_files_only=True
    )
    # Out of the mapped file, into memory aligned like ours: rounding can depend on alignment.
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def load(folder: Path, **options: Any) -> LoadedModel:
    """Load a folder on the CPU; `options` override what `load_model` is told."""
    chosen: dict[str, Any] = {
        "torch_device": torch.device("cpu"),
        "dtype": None,
        "allocate_host": lambda size: torch.empty(size, dtype=torch.uint8),
        "progress": lambda step: None,
        "cancelled": lambda: False,
    }
    return load_model(folder, **chosen | options)


def attach_plain_runner(layers: tuple[MoeLayer, ...], store: ExpertStore) -> None:
    """Run experts in the plainest way that keeps the promise: from the store, one by one."""

    def run(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        layout = layers[layer].format
        math = layers[layer].math.reading(layout, few_tokens=None)
        dtype = math.row_dtype(hidden.dtype, weights.dtype)
        rows = torch.zeros((index.numel(), hidden.shape[-1]), dtype=dtype, device=hidden.device)
        for expert in index.unique().tolist():
            tokens, positions = rows_of(index, expert)
            parts = views(store.bytes_of(ExpertId(layer, expert)).to(hidden.device), layout)
            rows[tokens * index.shape[1] + positions] = math.rows(
                parts, hidden[tokens], weights[tokens, positions, None]
            )
        return combine(rows, index, hidden.dtype)

    attach(layers, run)


def logits(model: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of a prompt of 2x13 tokens and of one cached step after it."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 150, (2, 13), generator=generator)
    token = torch.randint(3, 150, (2, 1), generator=generator)
    with torch.inference_mode():
        first = model(input_ids=prompt, use_cache=True)
        second = model(input_ids=token, past_key_values=first.past_key_values, use_cache=True)
    return first.logits, second.logits


def randomize(model: Any) -> None:
    """Draw weights of usual sizes, biases and buffers included."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                scale = parameter.shape[-1] ** -0.5
            elif "bias" in name:
                scale = 0.1
            else:
                continue
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name or "expert_bias" in name:
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            elif "tid2eid" in name:
                buffer.copy_(torch.randint(0, 8, buffer.shape, generator=generator))


def rows_of(top_k_index: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (tokens, positions) where `top_k_index` (T, k) names `expert`, in `eager`'s order."""
    positions, tokens = torch.where(top_k_index.T == expert)
    return tokens, positions
