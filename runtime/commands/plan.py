"""`plan`: where every byte of the card's memory would go for a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from runtime.commands.request import load_request


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return profile, shape and plan without reading any weights."""
    from runtime.assembly import dtype_for, profile_for
    from runtime.config import model_folder, model_name
    from runtime.loader import read_shape
    from runtime.planner import plan_memory

    request = load_request(options)
    folder = model_folder(request.model)
    profile = profile_for(request)
    shape = read_shape(folder, dtype_for(profile))
    plan = plan_memory(
        profile, shape, cache_fraction=request.cache_fraction, vram_bytes=request.vram_bytes
    )
    return {
        "emulated": profile.emulated,
        "device": profile.device_name,
        "model": model_name(folder),
        "experts": shape.expert_count,
        "shape": asdict(shape),
        "plan": {**asdict(plan), "slots_bytes": plan.slots_bytes, "used_bytes": plan.used_bytes},
        "cache_fraction": plan.slots / shape.expert_count,
    }


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    plan = result["plan"]
    mark = " (emulated)" if result["emulated"] else ""
    lines = [f"{result['model']} on {result['device']}{mark}"]
    for part in ("dense", "kv", "workspace", "reserve", "slots"):
        lines.append(f"{part:10} {plan[part + '_bytes']:>18,} bytes")
    lines.append(f"{'used':10} {plan['used_bytes']:>18,} of {plan['budget_bytes']:,} bytes")
    share = f"{result['cache_fraction']:.0%}"
    lines.append(f"{plan['slots']:,} of {result['experts']:,} experts fit in slots ({share}).")
    lines.append(f"{plan['kv_tokens']:,} tokens of context.")
    return "\n".join(lines) + "\n"
