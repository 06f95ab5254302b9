"""Conversations that are kept and those that answer: ids stay true, and the budget is kept."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from runtime.sequences import Conversation, Conversations, common_prefix

# Reuse


class ListCache:
    """A cache that is only a list of ids; `croppable` as a full-attention one is.

    `held_tokens` is what it has memory for: it takes more as the real one does.
    """

    def __init__(self, croppable: bool = True, continues: bool = True) -> None:
        self.past: list[int] = []
        self.can_crop = croppable
        self.continues = continues
        self.settled = 0
        self.expected = 0
        self.held_tokens = 0

    def expect(self, tokens: int) -> None:
        self.expected = tokens

    def append(self, ids: list[int]) -> None:
        self.past += ids
        if len(self.past) > self.held_tokens:
            self.held_tokens = max(len(self.past), self.expected)

    def settle(self) -> None:
        self.settled += 1
        self.held_tokens = len(self.past)

    def crop(self, tokens: int) -> None:
        assert self.can_crop
        del self.past[tokens:]
        self.held_tokens = len(self.past)


TURNS = st.lists(
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 2), min_size=1, max_size=8)),
    max_size=12,
)


def compute(conversation: Conversation, prompt: list[int]) -> None:
    conversation.cache.append(prompt[len(conversation.ids) :])
    conversation.ids += prompt[len(conversation.ids) :]


@settings(max_examples=200, deadline=None)
@given(TURNS, st.integers(8, 20), st.booleans(), st.booleans(), st.data())
def test_whatever_was_asked_before_the_cache_holds_the_ids_it_claims(
    turns: list[tuple[str, list[int]]],
    budget: int,
    croppable: bool,
    continues: bool,
    data: st.DataObject,
) -> None:
    store = Conversations(lambda: ListCache(croppable, continues), budget)
    for name, prompt in turns:
        conversation = store.take(name, prompt, len(prompt))
        assert conversation.cache.past == conversation.ids
        assert conversation.ids == prompt[: len(conversation.ids)]
        assert len(conversation.ids) < len(prompt)
        assert continues or len(conversation.ids) in (0, len(prompt) - 1)
        assert store.grow(conversation, len(prompt) - len(conversation.ids))
        assert store.tokens + len(prompt) <= budget
        compute(conversation, prompt)
        conversation.intact = data.draw(st.booleans())
        store.keep(conversation)
        assert store.tokens <= budget


def kept(store: Conversations, name: str, ids: list[int]) -> None:
    conversation = store.take(name, [*ids, 9], 9)
    assert store.grow(conversation, len(ids) - len(conversation.ids))
    compute(conversation, ids)
    store.keep(conversation)


def test_what_is_kept_gives_its_room_back_and_what_is_broken_is_forgotten() -> None:
    store = Conversations(ListCache, 10)
    for intact in (True, False):
        conversation = store.take("a", [1, 2, 9], 9)
        assert store.grow(conversation, 2 - len(conversation.ids))
        compute(conversation, [1, 2])
        conversation.intact = intact
        settled = conversation.cache.settled
        store.keep(conversation)
        assert conversation.cache.settled - settled == intact
    assert store.tokens == 0


def test_what_is_shared_is_reused_and_the_oldest_goes_first() -> None:
    store = Conversations(ListCache, 10, room_tokens=0)
    for name in "ab":
        kept(store, name, [1, 2, 3, 4])
    first = store.take("a", [1, 2, 9], 3)
    assert first.ids == [1, 2]
    assert store.grow(first, 1)
    store.keep(first)
    other = store.take("c", [5], 5)
    assert store.grow(other, 5)
    assert store.take("b", [1, 2, 3, 4, 5], 5).ids == []
    assert store.take("a", [1, 2, 3, 4, 5], 5).ids == [1, 2]


# Sharing the budget


class Sharing(RuleBasedStateMachine):
    """Conversations that come, grow and go in any order, beside a plain account of the tokens."""

    budget = 12

    def __init__(self) -> None:
        super().__init__()
        self.store = Conversations(ListCache, self.budget)
        self.out: list[Conversation] = []

    @initialize(room=st.sampled_from([0, 2, 32]))
    def start(self, room: int) -> None:
        self.store = Conversations(ListCache, self.budget, room)

    @rule(name=st.sampled_from("abcd"), tokens=st.integers(1, 6), answer=st.integers(0, 8))
    def come(self, name: str, tokens: int, answer: int) -> None:
        if len(self.out) < 6:
            most = min(self.budget, tokens + answer)
            self.out.append(self.store.take(name, [0] * tokens, most))

    @rule(who=st.integers(0, 5), tokens=st.integers(1, 6))
    def grow(self, who: int, tokens: int) -> None:
        if who < len(self.out):
            one = self.out[who]
            wanted = min(tokens, one.most_tokens - len(one.ids))
            if self.store.grow(one, wanted):
                compute(one, [*one.ids, *[0] * wanted])
            else:
                assert who > 0, "the first to come never waits"

    @rule(who=st.integers(0, 5), intact=st.booleans())
    def go(self, who: int, intact: bool) -> None:
        if who < len(self.out):
            one = self.out.pop(who)
            one.intact = intact
            self.store.keep(one)

    @rule()
    def come_to_their_ends(self) -> None:
        """Whatever happened, everybody can finish, whoever came first before the others."""
        for one in self.out:
            left = one.most_tokens - len(one.ids)
            assert left == 0 or self.store.grow(one, left)
            compute(one, [*one.ids, *[0] * left])
            self.store.keep(one)
        self.out.clear()

    @invariant()
    def the_budget_is_kept(self) -> None:
        assert self.store.tokens + self.store.taken_tokens <= self.budget
        held = sum(one.cache.held_tokens for one in self.out)
        assert sum(len(one.ids) for one in self.out) <= held <= self.store.taken_tokens
        caches = [id(one.cache) for one in self.out]
        assert len(set(caches)) == len(caches)
        assert all(one.cache.past == one.ids for one in self.out)


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_room_for_tokens_to_come_is_taken_from_nobody_who_answers() -> None:
    store = Conversations(ListCache, 60, 32)
    first, second = store.take("a", [0] * 10, 20), store.take("b", [0] * 10, 60)
    assert store.grow(second, 1)
    assert second.granted_tokens == second.cache.expected == 33
    compute(second, [0])
    for tokens in range(2, 42):
        assert store.grow(second, 1) == (tokens <= 40)
        compute(second, [0] * min(tokens, 40))
    assert second.cache.held_tokens == second.granted_tokens == 40
    assert store.grow(first, 10)
    assert first.granted_tokens == 20


def test_a_newcomer_waits_only_for_what_those_before_it_may_still_need() -> None:
    store = Conversations(ListCache, 10)
    first = store.take("a", [1, 2], 6)
    second = store.take("b", [1, 2], 6)
    third = store.take("c", [1, 2], 6)
    assert store.grow(second, 4)
    compute(second, [1, 2, 3, 4])
    assert not store.grow(second, 1)
    assert not store.grow(third, 1)
    assert store.grow(first, 6)
    store.keep(first)
    assert store.grow(second, 2)
    assert store.grow(third, 4)


def test_a_second_turn_of_one_conversation_gets_a_cache_of_its_own() -> None:
    store = Conversations(ListCache, 20)
    kept(store, "a", [1, 2, 3])
    first, second = store.take("a", [1, 2, 3, 4], 5), store.take("a", [1, 2, 3, 4], 5)
    assert (first.ids, second.ids) == ([1, 2, 3], [])
    assert first.cache is not second.cache
    for one in (first, second):
        assert store.grow(one, 4 - len(one.ids))
        compute(one, [1, 2, 3, 4])
        store.keep(one)
    assert store.tokens == 4


def test_a_conversation_that_comes_back_is_the_most_recent_one() -> None:
    store = Conversations(ListCache, 10)
    early, late = store.take("a", [1, 2, 3], 4), store.take("a", [1, 2, 3], 4)
    for one in (early, late):
        assert store.grow(one, 2)
        compute(one, [1, 2])
    store.keep(early)
    kept(store, "b", [1, 2])
    store.keep(late)
    filling = store.take("c", [1], 8)
    assert store.grow(filling, 8)
    assert store.take("b", [1, 2, 3], 3).ids == []
    assert store.take("a", [1, 2, 3], 3).ids == [1, 2]


def test_a_cache_that_cannot_be_cut_is_kept_only_as_an_exact_prefix() -> None:
    store = Conversations(lambda: ListCache(False), 20)
    kept(store, "a", [1, 2])
    assert store.take("a", [1, 2, 3], 3).ids == [1, 2]
    kept(store, "b", [1, 2])
    assert store.take("b", [1, 9, 3], 3).ids == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_the_common_prefix_is_common_and_longest(left: list[int], right: list[int]) -> None:
    size = common_prefix(left, right)
    assert left[:size] == right[:size]
    assert left[: size + 1] != right[: size + 1] or size in (len(left), len(right))
