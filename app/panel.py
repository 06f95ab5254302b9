"""What limits the speed just now, as one sentence and one piece of advice. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from app.policies import policy_text
from runtime.core import POLICIES, EngineStatus, TelemetrySnapshot

Cause = Literal[
    "link", "cpu", "device", "prompt", "idle", "empty", "loading", "starting", "restarting", "dead"
]


@dataclass(frozen=True)
class Limit:
    """`text` says what limits speed, with the numbers; `advice` says what could be done."""

    cause: Cause
    text: str
    advice: str = ""


def limit(
    status: EngineStatus, snapshot: TelemetrySnapshot | None, prediction: bool = True
) -> Limit:
    """Return what limits the speed of this engine now. Emulated figures say so.

    `prediction` is what a person chose; where that costs speed, the advice says so.
    """
    if status.state == "starting":
        return Limit("starting", "The engine is starting.", "This takes some seconds.")
    if status.state == "restarting":
        return Limit(
            "restarting",
            "The engine stopped and is being started again.",
            "Your chats are safe. Retry the answer when the model is back.",
        )
    if status.state == "dead":
        return Limit(
            "dead",
            "The engine stopped and could not be started again.",
            status.next_step or "Close PreScope and open it again.",
        )
    if status.loading is not None:
        return _loading(status)
    if status.model is None or snapshot is None:
        return Limit("empty", "No model is loaded.", "Choose a model at the top.")
    if not snapshot.generating:
        return Limit("idle", "Nothing is running.", "Send a message to see the experts move.")
    return _running(snapshot, prediction)


def _loading(status: EngineStatus) -> Limit:
    progress = status.progress
    share = (
        f" {100 * progress.done_bytes / progress.total_bytes:.0f} %" if progress.total_bytes else ""
    )
    what = f": {progress.text}" if progress.text else ""
    meanwhile = (
        f"{status.model} answers until then." if status.model else "Answers start when it is done."
    )
    return Limit("loading", f"Loading {shown_name(status.loading or '')}{share}{what}", meanwhile)


def shown_name(model: str) -> str:
    """Return what a person calls the model of a `LoadRequest`: a name, not a path."""
    if model == "default":
        return "the built-in model"
    parts = model.replace("\\", "/").rstrip("/").split("/")
    for part in parts:
        if part.startswith("models--"):
            return "/".join(part.split("--")[1:])
    return parts[-1] or model


def _running(now: TelemetrySnapshot, prediction: bool) -> Limit:
    token_s = now.token_s
    if token_s <= 0:
        return Limit(
            "prompt",
            _sentence(now, "The prompt is being read; no token has come yet."),
            "A long prompt takes longer; the next one of this chat reuses it.",
        )
    link_s = min(now.stall_s_per_token, token_s)
    cpu_s = min(now.cpu_s_per_token, token_s)
    rest_s = max(0.0, token_s - link_s - cpu_s)
    if link_s >= cpu_s and link_s >= rest_s:
        advice = _link_advice(now, prediction) or _cache_advice(now, "link")
        return Limit("link", _sentence(now, _link_text(now, link_s)), advice)
    if cpu_s >= rest_s:
        text = f"Experts computed on the CPU take {_part(cpu_s, token_s)}."
        return Limit("cpu", _sentence(now, text), _cache_advice(now, "cpu"))
    text = (
        f"Computing on the device and host work take {_part(rest_s, token_s)}; "
        f"{_percent(now.hit_rate)} of the experts were in place."
    )
    return Limit(
        "device", _sentence(now, text), "The link is not the limit: a smaller model is faster."
    )


def _link_text(now: TelemetrySnapshot, link_s: float) -> str:
    text = f"Waiting for experts to be copied takes {_part(link_s, now.token_s)}"
    if now.link_max_bytes_per_s > 0:
        used = now.link_bytes_per_s / now.link_max_bytes_per_s
        text += (
            f"; the link runs at {_percent(min(1.0, used))} of {_rate(now.link_max_bytes_per_s)}"
        )
    return text + "."


def _link_advice(now: TelemetrySnapshot, prediction: bool) -> str:
    """Return what prediction could do about waiting for the link, or how it fares; "" if fine."""
    if not policy_text(now.policy).predicts:
        all_fit = now.cache_slots >= now.layers * now.experts
        if now.policy == "hybrid" and "prescope" in POLICIES and not all_fit:
            return (
                "The policy PreScope also copies experts ahead, where that pays: "
                "choose it in the settings."
            )
        return ""
    if not prediction:
        return "Prediction is off: switched on, experts are copied before their layer asks."
    in_time, late, wasted = now.prefetch_bytes_per_token
    if late > in_time + wasted:
        return "Most of what is copied ahead comes late: the link is full, a larger cache helps."
    if wasted > in_time + late:
        return "Most of what is copied ahead goes unused: the figures below say what it brings."
    return ""


def _cache_advice(now: TelemetrySnapshot, cause: Literal["link", "cpu"]) -> str:
    total = now.layers * now.experts
    if now.policy == "cpu-only":
        return "Every expert runs on the CPU: a device with memory for some of them is faster."
    if not policy_text(now.policy).splits:
        best = "prescope" if "prescope" in POLICIES else "hybrid"
        return (
            f"The policy {policy_text(best).label} splits the misses between link and CPU: "
            "choose it in the settings."
        )
    if now.cache_slots < total:
        return (
            f"{now.cache_slots:,} of {total:,} experts fit in the cache and "
            f"{_percent(now.hit_rate)} of the uses hit it: a larger cache helps."
        )
    return "All experts will be in place soon." if cause == "link" else "A smaller model is faster."


def _sentence(now: TelemetrySnapshot, text: str) -> str:
    return f"Emulated card: {text[0].lower()}{text[1:]}" if now.emulated else text


def _part(part_s: float, token_s: float) -> str:
    return f"{_percent(part_s / token_s)} of a token's {_time(token_s)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _time(seconds: float) -> str:
    return (
        f"{seconds:.1f} s"
        if seconds >= 1
        else f"{1000 * seconds:.{0 if seconds > 0.01 else 1}f} ms"
    )


def _rate(bytes_per_s: float) -> str:
    if bytes_per_s >= 1e9:
        return f"{bytes_per_s / 1e9:.1f} GB/s"
    return f"{bytes_per_s / 1e6:.0f} MB/s"
