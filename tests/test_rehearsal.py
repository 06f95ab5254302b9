"""A rehearsal leaves nothing to compile for the first answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.rehearsal import rehearse
from runtime.scheduler import Costs
from tests.machines import emulated_profile

ROOT = Path(__file__).resolve().parent.parent

COUNT = """
import json, sys
from runtime import calibration, eviction_next_use, policy_windows, scheduler, use_counts
from runtime.rehearsal import rehearse
from tests.machines import emulated_profile

def versions():
    modules = (calibration, eviction_next_use, policy_windows, scheduler, use_counts)
    compiled = {f"{m.__name__}.{n}": v for m in modules for n, v in vars(m).items()
                if hasattr(v, "py_func")}
    return {name: len(function.signatures) for name, function in compiled.items()}

if sys.argv[1] == "rehearsed":
    rehearse(emulated_profile())
before = versions()
from runtime.trace import ForwardPass, LayerStep
from tests.test_policies import run
from tests.test_simulate import EXPERTS, LAYERS, trace_of
for tokens in (1, 4):
    trace = trace_of(2, passes=60, recall=0.8, tokens=tokens)
    run(trace, "prescope", slots=20)
    run(trace, "hybrid", slots=20, eviction="expected-next-use")
everyone = LayerStep({expert: 60 for expert in range(EXPERTS)}, recency={0: 2.5, 1: 0.5})
run([ForwardPass(320, (everyone,) * LAYERS, span=320)] * 22, "prescope", slots=24)
print(json.dumps([before, versions()]))
"""


@pytest.mark.parametrize("rehearsed", [True, False])
def test_after_a_rehearsal_nothing_is_left_to_compile(rehearsed: bool) -> None:
    """Counted in a process of its own: how many versions there are of each compiled function."""
    how = "rehearsed" if rehearsed else "not rehearsed"
    ran = subprocess.run(
        [sys.executable, "-c", COUNT, how],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    before, after = json.loads(ran.stdout)
    assert len(before) >= 6
    if rehearsed:
        assert before == after
    else:
        assert before != after, "the count would not show what was compiled late"


def test_it_works_for_machines_with_any_balance() -> None:
    for link, cpu in ((1e6, 1e9), (1e9, 1e6)):
        profile = emulated_profile(link_bytes_per_s=link, cpu_bytes_per_s=cpu)
        rehearse(profile)
        assert Costs.of(profile).link_bytes_per_s == link
