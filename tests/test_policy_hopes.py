"""What copies ahead were to save is held against what came of them."""

from __future__ import annotations

import pytest

from runtime.cache import NOBODY
from runtime.core import ExpertId
from runtime.policy import Moment
from runtime.policy_hopes import Hopes
from runtime.transfer_queue import QueueState
from tests.test_policies import routed_of

SIZE = 1000
HIT, LATE, NOT_USED, REFUSED = 0, 1, 2, 3


def moment(left_bytes: int = 0) -> Moment:
    left = {ExpertId(0, LATE): left_bytes} if left_bytes else {}
    queue = QueueState(0.0, left_bytes=left)
    return Moment(
        0.0, 1, False, 0.0, 0.0, queue, 0, lambda layer: (HIT, LATE, NOT_USED), lambda layer: NOBODY
    )


def kept_after(hopes: Hopes, uses: dict[int, float], left_bytes: int = 0) -> float:
    for _ in range(200):
        for number, use in uses.items():
            hopes.hope(ExpertId(0, number), use)
        routed = routed_of(0, [HIT], [LATE])
        hopes.routed(routed, moment(left_bytes), SIZE)
    return hopes.kept


def test_a_hope_is_believed_until_something_came_of_it() -> None:
    assert Hopes().kept == 1.0


@pytest.mark.parametrize(
    ("uses", "left_bytes", "kept"),
    [
        ({HIT: 1.0}, 0, 1.0),
        ({HIT: 0.5}, 0, 1.0),  # never more than was hoped
        ({LATE: 1.0}, 750, 0.25),  # only the part that had come was saved
        ({NOT_USED: 0.8}, 0, 0.0),
        ({HIT: 1.0, NOT_USED: 1.0}, 0, 0.5),
    ],
)
def test_the_share_that_comes_true_is_found(
    uses: dict[int, float], left_bytes: int, kept: float
) -> None:
    assert kept_after(Hopes(), uses, left_bytes) == pytest.approx(kept, abs=0.03)


def test_what_was_refused_a_slot_says_nothing() -> None:
    assert kept_after(Hopes(), {REFUSED: 1.0}) == 1.0


def test_unchecked_hopes_are_believed_whatever_comes() -> None:
    assert kept_after(Hopes(check=False), {NOT_USED: 1.0}) == 1.0
