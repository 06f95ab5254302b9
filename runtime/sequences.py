"""The conversations whose keys and values are still in memory, and what of them can be reused.

One token budget for all of them. The least recently used conversation goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Cache(Protocol):
    """The keys and values of one conversation; `past` is what the model itself takes.

    `continues`: several tokens at once may follow what it holds (one always may).
    """

    past: Any
    continues: bool

    @property
    def can_crop(self) -> bool: ...

    def crop(self, tokens: int) -> None: ...


@dataclass
class Conversation:
    """`ids` are the tokens whose keys and values `cache` holds, in order: never more, never less.

    While a forward pass runs, the two disagree and `intact` is false; a conversation that is left
    so must be forgotten.
    """

    conversation_id: str
    cache: Cache
    ids: list[int] = field(default_factory=list)
    intact: bool = True

    def rewind(self) -> None:
        """Undo a pass that was broken off, where the cache can be cut."""
        if self.cache.can_crop:
            self.cache.crop(len(self.ids))
            self.intact = True


class Conversations:
    """Owns the caches between turns. Used by the engine thread only."""

    def __init__(self, new_cache: Callable[[], Cache], budget_tokens: int) -> None:
        self._new_cache = new_cache
        self.budget_tokens = budget_tokens
        self._kept: OrderedDict[str, Conversation] = OrderedDict()

    @property
    def tokens(self) -> int:
        """How many tokens the kept conversations hold together; at most the budget."""
        return sum(len(conversation.ids) for conversation in self._kept.values())

    def take(self, conversation_id: str, prompt_ids: Sequence[int]) -> Conversation:
        """Hand out the conversation, cut down to what it shares with the prompt.

        At least the prompt's last token is left to be computed. The conversation leaves the
        store until `keep` brings it back.
        """
        kept = self._kept.pop(conversation_id, None)
        if kept is not None:
            shared = min(common_prefix(kept.ids, prompt_ids), len(prompt_ids) - 1)
            if not kept.cache.continues and len(prompt_ids) - shared > 1:
                shared = 0
            if shared == len(kept.ids):
                return kept
            if kept.cache.can_crop and shared > 0:
                kept.cache.crop(shared)
                del kept.ids[shared:]
                return kept
        return Conversation(conversation_id, self._new_cache())

    def make_room(self, tokens: int) -> None:
        """Forget conversations, oldest first, until `tokens` more fit in the budget."""
        while self._kept and self.tokens + tokens > self.budget_tokens:
            self._kept.popitem(last=False)

    def keep(self, conversation: Conversation) -> None:
        """Take a conversation back as the most recent one, unless a pass left it broken."""
        if conversation.intact and 0 < len(conversation.ids) <= self.budget_tokens:
            self.make_room(len(conversation.ids))
            self._kept[conversation.conversation_id] = conversation

    def clear(self) -> None:
        """Forget every conversation."""
        self._kept.clear()


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading elements are equal."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
