"""The KV cache of one conversation: transformers' dynamic cache, with what its family allows.

Only caches made of plain full-attention layers can be cut anywhere; sliding-window, linear and
compressed layers have forgotten what a cut would need. A test walks over every family and compares
prompts computed in pieces, after a cut and at once: the sets below are what it found.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

# Their recurrent layers start from nothing when given several tokens after others, silently.
_NEED_WHOLE_PROMPTS = {"jamba"}
# They take only a cache of their own class, and make it themselves if given none.
_BRING_THEIR_OWN = {"minimax"}


class KvCache:
    """The keys and values of one conversation. Used by one thread, the engine's.

    `past` is what the model takes and returns. `continues` says whether several tokens at once may
    follow what the cache holds; one always may.
    """

    def __init__(self, config: Any) -> None:
        family = config.get_text_config().model_type
        self.past: Any = None if family in _BRING_THEIR_OWN else DynamicCache(config=config)
        self.continues = family not in _NEED_WHOLE_PROMPTS

    @property
    def can_crop(self) -> bool:
        """Whether the cache may be cut to any shorter length."""
        return type(self.past) is DynamicCache and all(
            type(layer) is DynamicLayer for layer in self.past.layers
        )

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on. Only for caches that `can_crop`."""
        for layer in self.past.layers:
            if layer.is_initialized:
                # A copy, so that the tail's memory is really given back.
                layer.keys = layer.keys[..., :tokens, :].clone()
                layer.values = layer.values[..., :tokens, :].clone()
