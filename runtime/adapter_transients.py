"""What a forward pass needs for a moment, found by running shapes through the model's skeleton.

Every family's own code runs, on the meta device, where tensors have sizes and no memory: scores of
an attention that is not fused, keys and values repeated per head, masks, activations. The peak of
a few sizes of chunk and context gives the coefficients of `Transients`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.adapter import MoeLayer, attach, detach, expert_shapes
from runtime.adapter_config import REFUSALS
from runtime.core import Transients

CHUNKS = (8, 128, 512)
CONTEXTS = (2048, 8192)
DECODER_LAYERS = 8
"""Layers give back what they used: so many of the first show every kind of a repeating pattern."""


def transients_of(skeleton: Any, layers: Sequence[MoeLayer]) -> Transients:
    """Measure a meta skeleton's passes; a generous estimate where they do not run on shapes."""
    attach(layers, lambda layer, *routed: _experts(layers[layer], *routed))
    try:
        with _first_layers(skeleton, layers[0].name):
            peaks = {
                (tokens, context): peak_bytes(skeleton, tokens, context)
                for tokens in CHUNKS
                for context in CONTEXTS
            }
    except REFUSALS:
        return estimated(skeleton.config.get_text_config(), skeleton.dtype.itemsize)
    finally:
        detach(layers)
    return fitted(peaks)


def fitted(peaks: Mapping[tuple[int, int], int]) -> Transients:
    """Return coefficients that cover these peaks, by (tokens of the chunk, of the context).

    The peaks are of all pairs of some chunks and two contexts. Slopes are those between the two
    largest chunks, where the same steps of a layer need the most.
    """
    chunks, (short, long) = (sorted(set(axis)) for axis in zip(*peaks, strict=True))
    few, many = chunks[-2:]
    corners = peaks[many, long] - peaks[few, long] - peaks[many, short] + peaks[few, short]
    pair = max(0, -(-corners // ((many - few) * (long - short))))
    by_context = peaks[few, long] - peaks[few, short] - pair * few * (long - short)
    context = max(0, -(-by_context // (long - short)))
    by_token = peaks[many, short] - peaks[few, short] - pair * (many - few) * short
    token = max(0, -(-by_token // (many - few)))
    slopes = Transients(token, context, pair)
    left = [peak - slopes.size_bytes(*size) for size, peak in peaks.items()]
    return Transients(token, context, pair, max(0, *left))


def estimated(text: Any, item_bytes: int) -> Transients:
    """A generous guess from the configuration alone: scores as if no attention were fused."""
    heads = getattr(text, "num_attention_heads", None) or 1
    # Where layers differ the plain attribute is refused; the dictionary has the global value.
    width = heads * (text.to_dict().get("head_dim") or text.hidden_size // heads)
    token = 32 * max(text.hidden_size, width) * item_bytes
    return Transients(token, 4 * width * item_bytes, heads * (2 * item_bytes + 4))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors made inside and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.peak_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return made

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._known:
            return
        size_bytes = storage.nbytes()
        self._known.add(key)
        self.live_bytes += size_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key, size_bytes)

    def _gone(self, key: int, size_bytes: int) -> None:
        self._known.discard(key)
        self.live_bytes -= size_bytes


class _FusedAttention(TorchFunctionMode):
    """Gives torch's attention the shape of its result: its kernels keep no scores in memory.

    On meta tensors it would fall apart into the steps that those kernels avoid.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            query, value = args[0], args[2]
            return query.new_empty((*query.shape[:-1], value.shape[-1]))
        return func(*args, **(kwargs or {}))


@contextmanager
def _first_layers(skeleton: Any, inside: str) -> Iterator[None]:
    """Leave only the first decoder layers in the list that the module named `inside` is in."""
    owner, path = skeleton, inside.split(".")
    while path and not isinstance(getattr(owner, path[0]), nn.ModuleList):
        owner = getattr(owner, path.pop(0))
    if not path:
        yield
        return
    stack = getattr(owner, path[0])
    setattr(owner, path[0], stack[:DECODER_LAYERS])
    try:
        yield
    finally:
        setattr(owner, path[0], stack)


def peak_bytes(skeleton: Any, tokens: int, context: int) -> int:
    """Return what `tokens` tokens after others, `context` in all, need beside their cache."""
    live = LiveBytes()
    with torch.no_grad(), _FusedAttention(), live:
        past = _forward(skeleton, context - tokens, None) if context > tokens else None
        _cut_loose(past)
        live.peak_bytes = live.live_bytes
        past = _forward(skeleton, tokens, past)
        kept_bytes = live.live_bytes
        del past
    return max(live.peak_bytes - kept_bytes, 0)


def _cut_loose(past: Any) -> None:
    """Let sliding windows no longer hold on to all that they are cut from.

    Real chunks are short, so that what they hold on to is small.
    """
    for layer in getattr(past, "layers", ()):
        for name, value in list(vars(layer).items()):
            if isinstance(value, Tensor) and value.untyped_storage().nbytes() > value.nbytes:
                setattr(layer, name, value.clone())


def _forward(skeleton: Any, tokens: int, past: Any) -> Any:
    ids = torch.zeros((1, tokens), dtype=torch.int64, device=skeleton.device)
    output = skeleton(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
    return output.past_key_values


def _experts(layer: MoeLayer, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Make what computing one expert for all tokens makes: the worst that routing can do."""
    tokens, width = hidden.shape
    rows = hidden.new_empty((tokens * index.shape[1], width))
    gathered = hidden.new_empty((tokens, width))
    made = [rows, gathered]
    for part, shape in expert_shapes(layer.module).items():
        if len(shape) == 3:
            outputs = shape[1] * shape[2] // width
            made += [hidden.new_empty((tokens, outputs)) for _ in range(1 + ("up" in part))]
    combined: Tensor = torch.empty_like(hidden)
    del made
    return combined
