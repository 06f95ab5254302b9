"""Writes small random checkpoints in the hub's own format, one tensor per expert where it is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText


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
    _randomize(model)
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


def _randomize(model: Any) -> None:
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
