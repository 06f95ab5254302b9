"""Speeds before and after a switch: only tokens that follow one another in the same answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.pace import FULL_TOKENS, LEAST_TOKENS, SETTLE_S, PaceMeter, Pair, Progress, compared

TICK_S = 0.25


class Typist:
    """Feeds a meter as the live stream does: four looks a second at tokens that come evenly."""

    def __init__(self) -> None:
        self.meter = PaceMeter()
        self.now_s = 100.0
        self.tokens = 0
        self.last_s = 0.0
        self.started = 0
        self.on = True
        self.subject = "model"

    def look(self, answering: int) -> None:
        progress = Progress(self.tokens, self.last_s, answering, self.started)
        self.meter.sample(progress, self.on, self.subject)

    def answer(self, tokens: int, tokens_per_s: float, prompt_s: float = 0.6, at_once: int = 1):
        """Write `at_once` answers together; nothing comes while the prompt is read."""
        self.started += at_once
        begins_s = self.now_s + prompt_s
        first = self.tokens
        while self.tokens < first + tokens:
            self.now_s += TICK_S
            written = int((self.now_s - begins_s) * tokens_per_s)
            if written > self.tokens - first:
                self.tokens = first + min(tokens, written)
                self.last_s = begins_s + (self.tokens - first) / tokens_per_s
            self.look(at_once)
        self.rest()

    def rest(self, seconds: float = 3.0) -> None:
        self.now_s += seconds
        self.look(0)

    @property
    def pair(self) -> Pair:
        assert self.meter.pair is not None
        return self.meter.pair


def test_a_switch_between_answers_compares_their_speeds() -> None:
    typist = Typist()
    typist.on = False
    typist.answer(200, 40.0)
    typist.on = True
    typist.look(0)
    assert (typist.pair.on, typist.pair.after) == (True, None)
    assert typist.pair.before == pytest.approx(40.0, rel=1e-6)
    typist.answer(200, 50.0, prompt_s=5.0)
    assert typist.pair.after == pytest.approx(50.0, rel=1e-6)


def test_a_switch_in_mid_answer_leaves_out_what_was_in_flight() -> None:
    typist = Typist()
    typist.started = 1
    for step in range(80):
        typist.on = step >= 40
        settling = 0 <= step - 40 < SETTLE_S / TICK_S
        typist.tokens += 1 if settling else (10 if step < 40 else 12)
        typist.last_s = typist.now_s = typist.now_s + TICK_S
        typist.look(1)
    assert typist.pair.before == pytest.approx(40.0, rel=0.02)
    assert typist.pair.after == pytest.approx(48.0, rel=0.02)
    assert typist.pair.settled


def test_a_side_that_is_settled_stays() -> None:
    typist = Typist()
    typist.answer(200, 40.0)
    typist.on = False
    typist.answer(FULL_TOKENS + 100, 30.0)
    settled = typist.pair
    assert settled.settled
    typist.answer(300, 80.0)
    assert typist.pair == settled


def test_short_answers_add_up_without_their_pauses() -> None:
    typist = Typist()
    for _ in range(12):
        typist.answer(25, 40.0, prompt_s=2.0)
    typist.on = False
    for _ in range(12):
        typist.answer(25, 20.0, prompt_s=2.0)
    assert typist.pair.before == pytest.approx(40.0, rel=1e-6)
    assert typist.pair.after == pytest.approx(20.0, rel=1e-6)


def test_too_few_tokens_are_no_speed() -> None:
    typist = Typist()
    typist.answer(LEAST_TOKENS - 1, 4.0)
    typist.on = False
    typist.look(0)
    assert typist.meter.pair is None
    typist.answer(200, 40.0)
    typist.on = True
    typist.answer(LEAST_TOKENS - 1, 4.0)
    assert typist.pair.after is None


def test_switching_to_and_fro_keeps_the_last_real_speed() -> None:
    typist = Typist()
    typist.answer(200, 40.0)
    for on in (False, True, False):
        typist.on = on
        typist.look(0)
    assert typist.pair == Pair(False, pytest.approx(40.0))


def test_one_answer_is_not_compared_with_three_at_once() -> None:
    typist = Typist()
    typist.answer(200, 40.0)
    typist.on = False
    typist.answer(400, 90.0, at_once=3)
    assert typist.pair.after is None
    typist.answer(200, 36.0)
    assert typist.pair.after == pytest.approx(36.0, rel=1e-6)


def test_another_model_or_policy_forgets_the_pair() -> None:
    typist = Typist()
    typist.answer(200, 40.0)
    typist.on = False
    typist.look(0)
    assert typist.meter.pair is not None
    typist.subject = "another"
    typist.look(0)
    assert typist.meter.pair is None
    typist.on = True
    typist.look(0)
    assert typist.meter.pair is None


@given(
    st.lists(
        st.tuples(
            st.integers(0, 40), st.floats(0, 5), st.integers(0, 3), st.booleans(), st.booleans()
        ),
        max_size=60,
    )
)
def test_any_progress_gives_speeds_that_are_numbers(
    steps: list[tuple[int, float, int, bool, bool]],
) -> None:
    meter, progress, now_s = PaceMeter(), Progress(), 0.0
    for tokens, seconds, answering, begins, on in steps:
        now_s += seconds
        progress = Progress(
            progress.tokens + tokens,
            now_s if tokens else progress.last_token_s,
            answering,
            progress.started + begins,
        )
        meter.sample(progress, on, "model")
        pair = meter.pair
        if pair is not None:
            assert pair.on is on
            assert 0 < pair.before < float("inf")
            assert pair.after is None or 0 < pair.after < float("inf")


@pytest.mark.parametrize(
    ("before", "after", "text", "change"),
    [
        (47.1, 51.9, "47.1 → 51.9 tok/s", "+10 %"),
        (51.9, 47.1, "51.9 → 47.1 tok/s", "−9 %"),
        (50.0, 50.1, "50.0 → 50.1 tok/s", "±0 %"),
        (0.5, 0.75, "0.50 → 0.75 tok/s", "+50 %"),
        (150.0, 149.0, "150 → 149 tok/s", "−1 %"),
        (47.1, None, "47.1 → … tok/s", ""),
        (0.0, 5.0, "0.00 → 5.00 tok/s", "±0 %"),
    ],
)
def test_a_pair_in_words(before: float, after: float | None, text: str, change: str) -> None:
    assert compared(before, after) == (text, change)
