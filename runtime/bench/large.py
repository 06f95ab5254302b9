"""`bench large`: a checkpoint of gigabytes, loaded as stored and as int4, from RAM and from disk.

Every run is a process of its own, so that its peak memory is its own. Speeds are ratios within one
run of the suite. The weights are random: nothing here says anything about hits or text. How long
loading takes is `bench load`'s: here it would mostly be how fast the system finds new memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from runtime.config import data_dir
from runtime.planner_ram import RAM_RESERVE_BYTES, RAM_RESERVE_PERCENT, READING_EXPERTS

PROMPT = "Tell me a short story about a lighthouse."
NEW_TOKENS = 8
DEFAULT_LAYERS = 7
DISK_SHARE = 0.4
"""Share of the experts that finds a place in RAM when the disk tier is tried."""


@dataclass(frozen=True)
class Case:
    """One run: the form of its experts and the share of them that RAM may hold."""

    name: str
    experts: str
    ram_share: float | None


CASES = (
    Case("bf16 in RAM", "as stored", None),
    Case("bf16 with the disk tier", "as stored", DISK_SHARE),
    Case("int4, quantised while loading", "int4", None),
    Case("int4 again, from the cached file", "int4", None),
    Case("int4 with the disk tier", "int4", DISK_SHARE),
)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Write the checkpoint if it is not there, run every case, and set them side by side.

    Raises:
        ConfigError: the disk has no room for the checkpoint.
    """
    from runtime.bench.large_files import LAYER_BYTES, write_checkpoint

    layers = options.layers or DEFAULT_LAYERS
    folder = Path(options.folder) if options.folder else data_dir() / "bench" / "large"
    write_checkpoint(folder, layers, say)
    runs: list[dict[str, Any]] = []
    for case in CASES:
        say(f"{case.name}\n")
        ram_bytes = None
        if case.ram_share is not None:
            in_ram = next(run for run in runs if run["experts"] == case.experts)
            ram_bytes = _ram_for(in_ram["plan"], case.ram_share)
        runs.append({**_in_child(folder, case, ram_bytes), "case": case.name})
    return {
        "layers": layers,
        "expert_bytes_as_stored": layers * LAYER_BYTES,
        "cases": [_compared(record, runs) for record in runs],
    }


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    size_gb = result["expert_bytes_as_stored"] / 1e9
    lines = [
        f"{result['layers']} layers of Qwen3-30B-A3B's shape, {size_gb:.1f} GB of experts, random:",
        f"{'':34}{'peak/plan':>10}{'speed':>8}{'in RAM':>8}{'disk':>9}  tokens",
    ]
    for case in result["cases"]:
        same = {True: "the same", False: "OTHERS", None: ""}[case["same_tokens_as_in_ram"]]
        lines.append(
            f"{case['case']:34}{case['peak_to_plan']:10.2f}"
            f"{case['speed_to_first']:8.2f}{case['ram_share']:8.0%}"
            f"{case['disk_bytes_per_token'] / 1e9:6.2f} GB  {same}"
        )
    lines.append(
        "Speed is tokens/s as a ratio to the first line. Nothing follows for hits or text."
    )
    return "\n".join(lines) + "\n"


def _ram_for(plan: dict[str, int], share: float) -> int:
    """Return the RAM in which a plan of the same form keeps `share` of its experts."""
    reading_bytes = READING_EXPERTS * plan["slot_bytes"]
    needed_bytes = int(share * plan["ram_experts_bytes"]) + reading_bytes
    needed_bytes += plan["ram_device_bytes"] + plan["ram_reading_bytes"]
    by_percent = needed_bytes * 100 // (100 - RAM_RESERVE_PERCENT)
    return max(needed_bytes + RAM_RESERVE_BYTES, by_percent)


def _compared(record: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that hold on any machine: ratios, bytes, and whether tokens agree."""
    first = runs[0]
    in_ram = next(each for each in runs if each["experts"] == record["experts"])
    stats = record["stats"]
    return {
        "case": record["case"],
        "peak_to_plan": record["peak_bytes"] / record["planned_bytes"],
        "peak_bytes": record["peak_bytes"],
        "planned_bytes": record["planned_bytes"],
        "speed_to_first": stats["decode_tokens_per_s"] / first["stats"]["decode_tokens_per_s"],
        "ram_share": (stats["ram_experts"] or record["expert_count"]) / record["expert_count"],
        "ram_hit_rate": stats["ram_hit_rate"],
        "disk_bytes_per_token": stats["disk_bytes"] / max(1, stats["new_tokens"]),
        "same_tokens_as_in_ram": None
        if in_ram is record
        else record["token_ids"] == in_ram["token_ids"],
    }


def _in_child(folder: Path, case: Case, ram_bytes: int | None) -> dict[str, Any]:
    task = {"folder": str(folder), "experts": case.experts, "ram_bytes": ram_bytes}
    code = "from runtime.bench.large import child; child()"
    ran = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(task), stdout=subprocess.PIPE, text=True
    )
    if ran.returncode:
        raise RuntimeError(f"{case.name}: the run ended with {ran.returncode}")
    record: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return record


def child() -> None:
    """Load and generate once as standard input says; print the figures as JSON. Its own process."""
    import resource

    import runtime.loader  # noqa: F401  what libraries take is not the model's
    from runtime.assembly import assemble
    from runtime.core import Delta, Finished, LoadRequest, Message, SamplingParams
    from runtime.engine import Engine

    def peak_bytes() -> int:
        unit_bytes = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes

    task = json.loads(sys.stdin.read())
    request = LoadRequest(task["folder"], experts=task["experts"], ram_bytes=task["ram_bytes"])
    before_bytes = peak_bytes()
    parts = assemble(request).parts
    # Random weights may end the text at once.
    engine = Engine(replace(parts, eos_token_ids=frozenset()))
    ids: list[int] = []
    stats: dict[str, Any] = {}
    params = SamplingParams(max_new_tokens=NEW_TOKENS)
    for chunk in engine.generate("bench", [Message("user", PROMPT)], params):
        if isinstance(chunk, Delta):
            ids += chunk.token_ids
        elif isinstance(chunk, Finished):
            stats = asdict(chunk.stats)
    record = {
        "experts": task["experts"],
        "peak_bytes": peak_bytes() - before_bytes,
        "planned_bytes": parts.plan.ram_device_bytes
        + parts.plan.ram_reading_bytes
        + parts.plan.ram_experts_bytes,
        "expert_count": parts.shape.expert_count,
        "plan": asdict(parts.plan),
        "stats": stats,
        "token_ids": ids,
    }
    engine.close()
    sys.stdout.write(json.dumps(record) + "\n")
