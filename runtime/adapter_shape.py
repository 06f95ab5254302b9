"""The sizes of a model that a memory plan needs, from its skeleton alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime.adapter import MoeLayer, attach, detach
from runtime.adapter_config import REFUSALS
from runtime.adapter_transients import transients_of
from runtime.core import ModelShape

_DEFAULT_CONTEXT_TOKENS = 4096
LOOK_AHEAD_LAYERS = 2


def model_shape(name: str, skeleton: Any, layers: Sequence[MoeLayer]) -> ModelShape:
    """Describe a meta skeleton that still has its expert parameters."""
    experts = {id(p) for layer in layers for p in layer.module.parameters(recurse=False)}
    tensors = {id(t): t for t in (*skeleton.parameters(), *skeleton.buffers())}
    text = skeleton.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None)
    return ModelShape(
        name=name,
        experts=tuple(layer.experts for layer in layers),
        top_k=max(layer.top_k for layer in layers),
        expert_bytes=max(layer.format.size_bytes for layer in layers),
        dense_bytes=sum(t.nbytes for key, t in tensors.items() if key not in experts),
        kv_bytes_per_token=_kv_bytes_per_token(skeleton, layers),
        context_tokens=context if isinstance(context, int) else _DEFAULT_CONTEXT_TOKENS,
        transients=transients_of(skeleton, layers),
        predictor_bytes=_predictor_bytes(skeleton, layers),
    )


def _predictor_bytes(skeleton: Any, layers: Sequence[MoeLayer]) -> int:
    """Return the size of the matrices that guess each layer's experts from before it, twice."""
    hidden = getattr(skeleton.config.get_text_config(), "hidden_size", 0)
    rows = sum(layer.experts for layer in layers)
    return LOOK_AHEAD_LAYERS * rows * int(hidden) * int(skeleton.dtype.itemsize)


def _kv_bytes_per_token(skeleton: Any, layers: Sequence[MoeLayer]) -> int:
    """Return what one more token adds to the cache, found by running shapes through the model."""
    attach(layers, lambda layer, hidden, index, weights: torch.empty_like(hidden))
    try:
        with torch.no_grad():
            few, many = (_cache_bytes(skeleton, tokens) for tokens in (16, 48))
        return -(-(many - few) // 32)
    except REFUSALS:
        return _kv_bytes_from(skeleton.config.get_text_config(), skeleton.dtype)
    finally:
        detach(layers)


def _cache_bytes(skeleton: Any, tokens: int) -> int:
    ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
    cache = skeleton(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    tensors: dict[int, Tensor] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor):
                    tensors[id(tensor)] = tensor
    return sum(tensor.nbytes for tensor in tensors.values())


def _kv_bytes_from(text: Any, dtype: torch.dtype) -> int:
    """A generous guess for models whose forward pass does not run on shapes alone."""
    return int(4 * text.num_hidden_layers * text.hidden_size * dtype.itemsize)
