"""`plan`: whether a model fits a machine, where every byte goes, and how fast it would be."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.commands.request import load_request

if TYPE_CHECKING:
    from runtime.core import HardwareProfile, LoadRequest, MemoryPlan, ModelShape
    from runtime.loader_shape import ForeseenShape

_ON_DEVICE = {
    "dense": "dense weights",
    "predictor": "expert prediction",
    "kv": "keys and values",
    "workspace": "workspace",
    "reserve": "left alone",
    "slots": "expert slots",
}


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return where everything would go and the speed to expect, without reading any weights.

    A model that does not fit is an answer too: `fits` is false, with the reason and a next step.
    So is `unmeasured`: a card that no load has measured yet, and that must be left alone.
    """
    from runtime.config import model_folder, model_name
    from runtime.errors import MemoryPlanError
    from runtime.loader_shape import foresee_shape
    from runtime.planner import plan_memory

    request = load_request(options)
    if not options.profile and _unmeasured(options, request):
        return {"unmeasured": True}
    given = Path(request.model).expanduser()
    folder = given.resolve() if given.is_file() else model_folder(request.model)
    profile = None if options.profile else _this_machine(options, request)
    foreseen = foresee_shape(folder, wish=request.experts, **_dtypes(profile))
    if profile is None:
        profile = _stated_profile(options, request, foreseen)
    named = folder.parent if folder.name == "config.json" else folder
    shape = replace(foreseen.shape, name=model_name(named))
    result: dict[str, Any] = {
        "emulated": profile.emulated,
        "device": profile.device_name,
        "device_kind": profile.device_kind,
        "machine": "stated" if options.profile else "this one",
        "ram_bytes": {"free": profile.ram_free_bytes, "total": profile.ram_total_bytes},
        "model": shape.name,
        "read": "the weights' files" if foreseen.from_files else "config.json alone",
        "experts": shape.expert_count,
        "expert_form": foreseen.form,
        "shape": asdict(shape),
    }
    try:
        plan = plan_memory(
            profile,
            shape,
            cache_fraction=request.cache_fraction,
            vram_bytes=request.vram_bytes,
            context_tokens=options.context,
        )
    except MemoryPlanError as refusal:
        return {**result, "fits": False, "why": refusal.message, "next_step": refusal.next_step}
    return {**result, "fits": True, **_described(shape, plan, profile, request)}


def _described(
    shape: ModelShape, plan: MemoryPlan, profile: HardwareProfile, request: LoadRequest
) -> dict[str, Any]:
    from runtime.planner import prefill_tokens
    from runtime.throughput import foretell

    chunks = [prefill_tokens(plan, shape, past) for past in (0, plan.context_tokens - 1)]
    return {
        "plan": {**asdict(plan), "slots_bytes": plan.slots_bytes, "used_bytes": plan.used_bytes},
        "where": _where(shape, plan, profile),
        "cache_fraction": plan.slots / shape.expert_count,
        "prefill_tokens": {"first": chunks[0], "last": chunks[1]},
        "notes": list(plan.notes),
        "speed": asdict(foretell(shape, plan, profile, request.policy or "prescope")),
    }


def _where(
    shape: ModelShape, plan: MemoryPlan, profile: HardwareProfile
) -> list[dict[str, str | int]]:
    """Return every part with its place and its bytes."""
    device = "RAM" if profile.device_kind == "cpu" else "card"
    rows: list[dict[str, str | int]] = [
        {"place": device, "part": words, "bytes": getattr(plan, f"{part}_bytes")}
        for part, words in _ON_DEVICE.items()
    ]
    left_bytes = max(plan.budget_bytes - plan.used_bytes, 0)
    rows.append({"place": device, "part": "unused", "bytes": left_bytes})
    held = shape.expert_count if plan.ram_experts is None else plan.ram_experts
    rows.append({"place": "RAM", "part": "experts", "bytes": plan.ram_experts_bytes})
    if profile.device_kind == "cuda":
        rows.append({"place": "RAM", "part": "  of them pinned", "bytes": plan.pinned_bytes})
    rows.append({"place": "RAM", "part": "readers of experts", "bytes": plan.ram_reading_bytes})
    rows.append({"place": "RAM", "part": "left alone", "bytes": plan.ram_reserve_bytes})
    on_disk = (shape.expert_count - held) * shape.expert_bytes
    rows.append({"place": "disk", "part": "experts read when needed", "bytes": on_disk})
    return [row for row in rows if row["bytes"]]


def _unmeasured(options: argparse.Namespace, request: LoadRequest) -> bool:
    """Whether only the card could tell its speed, and an engine may be using it."""
    from runtime.config import DEFAULT_MODEL, data_dir
    from runtime.hardware import card_present
    from runtime.profiles_file import kept_profile

    if not options.unloaded or request.model == DEFAULT_MODEL:
        return False
    return kept_profile(data_dir(options.data_dir)) is None and card_present()


def _this_machine(options: argparse.Namespace, request: LoadRequest) -> HardwareProfile:
    """Probe this machine, or remember it as it was probed at the last load.

    Beside a running engine its card must be left alone, and what the engine holds is given back
    before another model is loaded.
    """
    from runtime.assembly import profile_for
    from runtime.config import DEFAULT_MODEL, data_dir
    from runtime.profiles_file import kept_profile

    if options.unloaded and request.model != DEFAULT_MODEL:
        kept = kept_profile(data_dir(options.data_dir))
        if kept is not None:
            free_bytes = min(request.ram_bytes or kept.ram_free_bytes, kept.ram_free_bytes)
            return replace(kept, ram_free_bytes=free_bytes)
    return profile_for(request)


def _dtypes(profile: HardwareProfile | None) -> dict[str, Any]:
    """Return what loading for this machine would ask for; a machine that is only stated is new."""
    from runtime.assembly import dtype_for, half_for

    return {} if profile is None else {"dtype": dtype_for(profile), "half": half_for(profile)}


def _stated_profile(
    options: argparse.Namespace, request: LoadRequest, foreseen: ForeseenShape
) -> HardwareProfile:
    """Return the profile of the machine that the person names, as a card and not an emulated one.

    Its RAM is what `--ram` says there is, less what a desktop holds of it.
    """
    from runtime.core import Reading
    from runtime.machines import RAM_IN_USE_BYTES, stated_machine

    machine = stated_machine(options.profile, options.link, options.cpu)
    shape = foreseen.shape
    profile = machine.profile(shape.dense_bytes // shape.layers, foreseen.weight_bits)
    total_bytes = request.ram_bytes or profile.ram_total_bytes
    if request.link_bytes_per_s is not None:
        rate = Reading(request.link_bytes_per_s, "assumed")
        profile = replace(profile, link_bytes_per_s=rate, link_unpinned_bytes_per_s=rate)
    return replace(
        profile,
        device_kind="cuda",
        ram_total_bytes=total_bytes,
        ram_free_bytes=max(total_bytes - RAM_IN_USE_BYTES, 0),
    )


def tell(result: dict[str, Any]) -> str:
    """Put the result into words."""
    if "unmeasured" in result:
        return "The card was not measured yet: load a model first.\n"
    mark = " (emulated)" if result["emulated"] else ""
    lines = [
        f"{result['model']} on {result['device']}{mark}",
        f"Experts: {result['experts']:,} in {result['expert_form']},"
        f" {_size(result['shape']['expert_bytes'])} each. Sizes from {result['read']}.",
        "",
    ]
    if not result["fits"]:
        return "\n".join([*lines, f"It does not fit. {result['why']}", result["next_step"]]) + "\n"
    plan, speed, ram = result["plan"], result["speed"], result["ram_bytes"]
    if result["device_kind"] == "cuda":
        lines[-1] = f"{_size(plan['budget_bytes'])} on the card"
    lines.append(f"{_size(ram['free'])} of {_size(ram['total'])} RAM free")
    place = ""
    for row in result["where"]:
        shown = row["place"] if row["place"] != place else ""
        place = row["place"]
        lines.append(f"{shown:5} {row['part']:26} {_size(row['bytes']):>11}")
    lines.append("")
    if plan["slots"]:
        share = f"{result['cache_fraction']:.0%}"
        lines.append(f"{plan['slots']:,} of {result['experts']:,} experts in slots ({share}).")
    chunk = result["prefill_tokens"]
    lines.append(
        f"{plan['kv_tokens']:,} tokens of context for all chats together,"
        f" {plan['context_tokens']:,} for one; prompts {chunk['first']} tokens at a time,"
        f" {chunk['last']} at the end of a full context."
    )
    lines += result["notes"]
    lines.append(
        f"About {speed['tokens_per_s']:.3g} tokens/s ({speed['low_tokens_per_s']:.3g} to"
        f" {speed['high_tokens_per_s']:.3g}), {speed['origin']}."
    )
    return "\n".join(lines) + "\n"


def _size(size_bytes: int) -> str:
    from runtime.planner_words import size_text

    return size_text(size_bytes)
