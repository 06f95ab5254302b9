"""What loading costs: never more memory than planned, and a person who cancels has it all back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.bench.load import CASES, Case, measure, tell
from runtime.bench.load_files import Size

SMALL = Size(layers=2, experts=24, hidden=1024, inner=512)
BOUND = 1.05
# As if somebody read every expert into memory of his own before it went to its place.
EXTRA_COPY = """
from runtime.store import ExpertStore
copies = []
fill = ExpertStore.fill
def copying(self, expert, place):
    fill(self, expert, place)
    copies.append(self._blocks.memory(place).clone())
ExpertStore.fill = copying
"""


@pytest.mark.alone
@pytest.mark.slow
def test_loads_of_every_kind_of_file_stay_within_their_plans() -> None:
    results = measure(CASES, 0, SMALL)
    assert [result["name"] for result in results] == [case.name for case in CASES]
    for result in results:
        assert 0.4 < result["peak_to_plan"] <= BOUND, result
        assert result["cancel_s"] < 2, result


@pytest.mark.slow
def test_a_second_copy_of_the_experts_would_be_noticed() -> None:
    cases = [case for case in CASES if case.name in ("bf16", "gguf Q4_0", "bf16 to int4")]
    for result in measure(cases, 0, SMALL, EXTRA_COPY):
        assert result["peak_to_plan"] > BOUND, result


@pytest.mark.slow
def test_a_cancelled_load_leaves_nothing_and_nothing_is_read_twice() -> None:
    (result,) = measure([Case("bf16", "bf16")], 1, replace(SMALL, experts=48))
    assert result["read_bytes"] > 290e6
    assert 0.9 < result["peak_to_plan"] <= BOUND
    assert abs(result["left_bytes"]) < 0.06 * result["planned_bytes"]
    # A second copy, or a read of every tensor for each expert, would show on any machine.
    assert result["experts_to_read"] < 20
    assert result["experts_to_disk_read"] < 20
    assert "bf16" in tell({"rounds": 1, "cases": [result]})
