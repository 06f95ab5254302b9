"""The last decoded tokens, as the predictor learns from them: what routers saw and chose."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

MEMORY_BYTES = 16 << 20
_TOKENS_MIN, _TOKENS_MAX = 64, 512


@dataclass
class Observed:
    """One token: `base` and `state` are what learned heads knew before it, if there are any."""

    token: Tensor
    base: Tensor | None
    state: Tensor | None
    inputs: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)


class Memory:
    """Keeps whole tokens, by reference, oldest first. One owner, the predictor.

    `token_bytes` is what one token's router inputs take: it limits how many are kept.
    """

    def __init__(self, layers: int, token_bytes: int) -> None:
        kept = min(_TOKENS_MAX, max(_TOKENS_MIN, MEMORY_BYTES // max(1, token_bytes)))
        self._layers = layers
        self._seen: deque[Observed] = deque(maxlen=kept)
        self._open: Observed | None = None
        self.fresh = 0
        """Tokens kept since the last `taken`."""

    def __len__(self) -> int:
        return len(self._seen)

    def begin(self, token_ids: Tensor, base: Tensor | None, state: Tensor | None) -> None:
        """A pass starts; only passes of one token are kept."""
        if self._open is not None and len(self._open.chosen) == self._layers:
            self._seen.append(self._open)
            self.fresh = min(self.fresh + 1, len(self._seen))
        self._open = Observed(token_ids, base, state) if token_ids.shape[0] == 1 else None

    def saw(self, layer: int, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> None:
        """Note what one layer's router saw and chose; layers come in order."""
        now = self._open
        if now is None:
            return
        if len(now.chosen) != layer or x.shape[0] != 1:
            self._open = None
            return
        now.inputs.append(x)
        now.chosen.append(top_k_index)
        now.weights.append(top_k_weights)

    def taken(self) -> None:
        """Everything kept so far has been looked at."""
        self.fresh = 0

    def clear(self) -> None:
        """Forget all tokens."""
        self._seen.clear()
        self.fresh = 0

    def tokens(self) -> Tensor:
        """Return (rows,) token ids."""
        return torch.cat([seen.token for seen in self._seen])

    def inputs(self, layer: int) -> Tensor:
        """Return (rows, hidden): what the router of `layer` saw."""
        return torch.cat([seen.inputs[layer] for seen in self._seen])

    def chosen(self, layer: int) -> Tensor:
        """Return (rows, k): the experts it chose."""
        return torch.cat([seen.chosen[layer] for seen in self._seen])

    def weights(self, layer: int) -> Tensor:
        """Return (rows, k): their weights."""
        return torch.cat([seen.weights[layer] for seen in self._seen])

    def bases(self, place: int) -> Tensor | None:
        """Return (rows, w) of a place, None unless learned heads were there for every token."""
        bases = [seen.base for seen in self._seen]
        if any(base is None for base in bases):
            return None
        return torch.cat([base[:, place] for base in bases if base is not None])

    def states(self) -> Tensor:
        """Return (rows, hidden): the last layer's state of the token before, zeros if unknown."""
        known = next(seen.inputs[-1] for seen in self._seen)
        return torch.cat(
            [torch.zeros_like(known) if s.state is None else s.state for s in self._seen]
        )
