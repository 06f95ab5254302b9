"""The KV cache of one conversation: transformers' dynamic cache, with what its family allows.

Only caches made of plain full-attention layers can be cut anywhere; sliding-window, linear and
compressed layers have forgotten what a cut would need. A test walks over every family and compares
prompts computed in pieces, after a cut and at once: the sets below are what it found.
"""

from __future__ import annotations

import logging
from itertools import compress
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

# Their recurrent layers start from nothing when given several tokens after others, silently.
_NEED_WHOLE_PROMPTS = {"jamba"}
# They take only a cache of their own class, and make it themselves if given none.
_BRING_THEIR_OWN = {"minimax"}


log = logging.getLogger("prescope.adapter")


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, (batch, heads, tokens, width) each, in a place with room.

    transformers' own layer makes a new tensor for every token: in a long conversation that moves
    more memory than the attention reads. Here `keys` and `values` are views of tensors that have
    room for `expected_tokens`, where those are more.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.expected_tokens = 0
        self._places: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens; return those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        expected = self.expected_tokens
        keys, self.keys = _appended(self._places[0], self.keys, key_states, expected)
        values, self.values = _appended(self._places[1], self.values, value_states, expected)
        self._places = keys, values
        return self.keys, self.values

    def cut(self, tokens: int) -> None:
        """Keep the first tokens only; the memory of all others, and of the room, is given back.

        Nothing changes if there is no memory for it.
        """
        assert self.keys is not None
        assert self.values is not None
        if tokens == 0 or not self.keys.numel() or not self.values.numel():
            self.reset()
            return
        keys = self.keys[..., :tokens, :].clone()
        values = self.values[..., :tokens, :].clone()
        self.keys, self.values, self._places = keys, values, (None, None)

    def reset(self) -> None:
        """Forget everything and give its memory back."""
        self._places = (None, None)
        super().reset()


def _appended(
    place: Tensor | None, held: Tensor, new: Tensor, expected_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the place that has `held` and then `new`, and the view of both.

    What is held may have been cut or replaced since: unless it is how `place` begins, and room for
    `new` is left there, both go to a new place.
    """
    length = held.shape[-2] if held.numel() else 0
    together = length + new.shape[-2]
    if place is None or not (
        place.data_ptr() == held.data_ptr()
        and place.dtype == new.dtype
        and place.device == new.device
        and place.shape[:-2] == new.shape[:-2]
        and place.shape[-2] >= together
    ):
        tokens = max(together, expected_tokens)
        place = new.new_empty((*new.shape[:-2], tokens, new.shape[-1]))
        if length:
            place[..., :length, :] = held
    place[..., length:together, :] = new
    return place, place[..., :together, :]


class KvCache:
    """The keys and values of one conversation. Used by one thread, the engine's.

    `past` is what the model takes and returns. `continues` says whether several tokens at once may
    follow what the cache holds; one always may.
    """

    def __init__(self, config: Any) -> None:
        family = config.get_text_config().model_type
        self.past: Any = None
        if family not in _BRING_THEIR_OWN:
            self.past = DynamicCache(config=config)
            plain = [type(layer) is DynamicLayer for layer in self.past.layers]
            for number in compress(range(len(plain)), plain):
                self.past.layers[number] = GrowingLayer()
        self.continues = family not in _NEED_WHOLE_PROMPTS

    @property
    def can_crop(self) -> bool:
        """Whether the cache may be cut to any shorter length."""
        return type(self.past) is DynamicCache and all(
            type(layer) is GrowingLayer for layer in self.past.layers
        )

    def crop(self, tokens: int) -> None:
        """Forget every position from `tokens` on. Only for caches that `can_crop`."""
        for layer in self.past.layers:
            if layer.is_initialized:
                layer.cut(tokens)

    def expect(self, tokens: int) -> None:
        """Keep memory for so many tokens in all when more has to be taken the next time."""
        layers = self.past.layers if type(self.past) is DynamicCache else ()
        for layer in layers:
            if type(layer) is GrowingLayer:
                layer.expected_tokens = tokens

    def settle(self) -> None:
        """Give back the memory that is kept for tokens to come, as far as there is memory for it:
        what stays in its place is moved, and without its room it is as good as before."""
        layers = self.past.layers if type(self.past) is DynamicCache else ()
        try:
            for layer in layers:
                if type(layer) is GrowingLayer and layer.is_initialized:
                    layer.cut(layer.get_seq_length())
        except RuntimeError as failure:  # as torch reports it
            log.info("a conversation keeps its room: %s", failure)
