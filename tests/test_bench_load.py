"""What loading costs: never more memory than planned, and a person who cancels has it all back."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.bench.load import measure, tell, write_checkpoint


@pytest.mark.alone
@pytest.mark.slow
def test_a_load_stays_within_its_plan_and_a_cancelled_one_leaves_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, layers=2, experts=48)
    result = measure(tmp_path, rounds=1)
    assert result["read_bytes"] > 290e6
    assert 0.9 < result["peak_to_plan"] <= 1.05
    assert result["cancel_s"] < 2
    assert abs(result["left_bytes"]) < 0.05 * result["planned_bytes"]
    # A second copy, or a read of every tensor for each expert, would show on any machine.
    assert result["load_to_new_memory"] < 10
    assert "of the plan" in tell(result)
