"""The KV cache of one conversation: transformers' dynamic cache, with the cuts it allows.

Only caches made of plain full-attention layers can be cut anywhere; sliding-window, linear and
compressed layers have forgotten what a cut would need.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer


class KvCache:
    """The keys and values of one conversation. Used by one thread, the engine's."""

    def __init__(self, config: Any) -> None:
        self.past: Any = DynamicCache(config=config)

    @property
    def can_crop(self) -> bool:
        """Whether the cache may be cut to any shorter length."""
        return all(type(layer) is DynamicLayer for layer in self.past.layers)

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on. Only for caches that `can_crop`."""
        for layer in self.past.layers:
            if layer.is_initialized:
                # A copy, so that the tail's memory is really given back.
                layer.keys = layer.keys[..., :tokens, :].clone()
                layer.values = layer.values[..., :tokens, :].clone()
