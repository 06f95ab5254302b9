"""The conversations whose keys and values are in memory: those that answer and those that are kept.

One token budget for all of them. Kept conversations are for reuse and go first, the least recently
used before the others; those that answer share the rest so that each is sure to come to its end.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

MAX_TOGETHER = 16
ROOM_TOKENS = 32
"""So many tokens more are granted than are asked for, where nobody who answers needs them."""


class Cache(Protocol):
    """The keys and values of one conversation; `past` is what the model itself takes.

    `continues`: several tokens at once may follow what it holds (one always may).
    """

    past: Any
    continues: bool

    @property
    def can_crop(self) -> bool: ...

    def crop(self, tokens: int) -> None: ...

    def expect(self, tokens: int) -> None: ...

    def settle(self) -> None: ...


@dataclass(eq=False)
class Conversation:
    """`ids` are the tokens whose keys and values `cache` holds, in order: never more, never less.

    While a forward pass runs, the two disagree and `intact` is false; a conversation that is left
    so must be forgotten. It may grow to `most_tokens`, and to `granted_tokens` at once.
    """

    conversation_id: str
    cache: Cache
    ids: list[int] = field(default_factory=list)
    intact: bool = True
    most_tokens: int = 0
    granted_tokens: int = 0

    def rewind(self) -> None:
        """Undo a pass that was broken off, where the cache can be cut."""
        if self.cache.can_crop:
            self.cache.crop(len(self.ids))
            self.intact = True


class Conversations:
    """Owns the token budget and the caches between turns. Used by the engine thread only.

    Conversations that were taken share the budget in the order they came: an earlier one may
    always grow to its `most_tokens`, counting on nobody but those before it to end. So the first
    never waits, whoever waits gets on once those before it have ended, and no token computed is
    thrown away to make room.
    """

    def __init__(
        self,
        new_cache: Callable[[], Cache],
        budget_tokens: int,
        room_tokens: int = ROOM_TOKENS,
    ) -> None:
        self._new_cache = new_cache
        self.budget_tokens = budget_tokens
        self._room_tokens = room_tokens
        self._kept: OrderedDict[str, Conversation] = OrderedDict()
        self._taken: list[Conversation] = []

    @property
    def tokens(self) -> int:
        """How many tokens the kept conversations hold together."""
        return sum(len(conversation.ids) for conversation in self._kept.values())

    @property
    def taken_tokens(self) -> int:
        """How many tokens the taken conversations may hold now, together.

        With those of the kept ones at most the budget.
        """
        return sum(conversation.granted_tokens for conversation in self._taken)

    def take(
        self, conversation_id: str, prompt_ids: Sequence[int], most_tokens: int
    ) -> Conversation:
        """Hand out the conversation, cut down to what it shares with the prompt.

        At least the prompt's last token is left to be computed. The conversation leaves the
        store until `keep` brings it back. Of one that is out already, or whose tokens would be in
        the way of those that answer, there is a fresh one.

        Args:
            conversation_id: which one.
            prompt_ids: what is to be answered.
            most_tokens: how many tokens it will hold at most; no more than the budget.
        """
        assert len(prompt_ids) <= most_tokens <= self.budget_tokens
        kept = self._kept.get(conversation_id)
        shared = self._reusable(kept, prompt_ids) if kept is not None else 0
        if not self._may_hold(len(self._taken), shared):
            kept = None  # it stays for whoever asks when there is room for it
        if kept is not None:
            del self._kept[conversation_id]
        if kept is None or not shared:
            conversation = Conversation(conversation_id, self._new_cache())
        else:
            conversation = kept
            if shared < len(kept.ids):
                kept.cache.crop(shared)
                del kept.ids[shared:]
        conversation.most_tokens = most_tokens
        conversation.granted_tokens = len(conversation.ids)
        self._taken.append(conversation)
        return conversation

    def grow(self, conversation: Conversation, tokens: int) -> bool:
        """Let a taken conversation compute `tokens` more; kept ones are forgotten for it.

        False if it has to wait for those that came before it.
        """
        wanted = len(conversation.ids) + tokens
        assert wanted <= conversation.most_tokens
        if wanted <= conversation.granted_tokens:
            return True
        place = self._taken.index(conversation)
        if not self._may_hold(place, wanted):
            return False
        roomy = min(wanted + self._room_tokens, conversation.most_tokens)
        conversation.granted_tokens = roomy if self._may_hold(place, roomy) else wanted
        conversation.cache.expect(conversation.granted_tokens)
        while self._kept and self.tokens + self.taken_tokens > self.budget_tokens:
            self._kept.popitem(last=False)
        return True

    def keep(self, conversation: Conversation) -> None:
        """Take a conversation back as the most recent one, unless a pass left it broken."""
        self._taken.remove(conversation)
        if conversation.intact and conversation.ids:
            conversation.cache.settle()
            self._kept.pop(conversation.conversation_id, None)
            self._kept[conversation.conversation_id] = conversation

    def clear(self) -> None:
        """Forget every conversation that is kept."""
        self._kept.clear()

    def _reusable(self, kept: Conversation, prompt_ids: Sequence[int]) -> int:
        """Return how many of its tokens can stay for this prompt."""
        shared = min(common_prefix(kept.ids, prompt_ids), len(prompt_ids) - 1)
        if not kept.cache.continues and len(prompt_ids) - shared > 1:
            return 0
        return shared if shared == len(kept.ids) or kept.cache.can_crop else 0

    def _may_hold(self, place: int, tokens: int) -> bool:
        """Whether the conversation at `place` may hold so many: all before it can still end."""
        later = tokens + sum(one.granted_tokens for one in self._taken[place + 1 :])
        for earlier in reversed(self._taken[:place]):
            if earlier.most_tokens + later > self.budget_tokens:
                return False
            later += earlier.granted_tokens
        return True


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many leading elements are equal."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
