"""What a person reads about each placement policy, and which of them copy experts ahead. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.core import POLICIES


@dataclass(frozen=True)
class PolicyText:
    """`what` it does and what it is `like`, in a person's words; `predicts` says it copies ahead.

    `splits` says that misses are divided between the link and the CPU.
    """

    label: str
    what: str = ""
    like: str = ""
    predicts: bool = False
    splits: bool = False


_TEXTS = {
    "prescope": PolicyText(
        "PreScope",
        "Predicts the next layers' experts, copies ahead where that pays, splits the rest.",
        predicts=True,
        splits=True,
    ),
    "hybrid": PolicyText(
        "Hybrid",
        "Splits misses between link and CPU by their measured rates; nothing is copied ahead.",
        "FreeToken",
        splits=True,
    ),
    "moe-infinity": PolicyText(
        "MoE-Infinity",
        "Remembers which experts a request used, and copies ahead what similar ones needed.",
        "MoE-Infinity",
        predicts=True,
    ),
    "on-demand": PolicyText(
        "On demand",
        "Keeps the experts used last and copies every miss when its layer asks.",
        "Mixtral-offloading",
    ),
    "cpu-miss": PolicyText(
        "CPU for misses",
        "Computes every miss on the CPU, where its weights are.",
        "Fiddler and llama.cpp --cpu-moe",
    ),
    "static-split": PolicyText(
        "Static split",
        "Keeps the experts of the first layers on the card for good, the rest on the CPU.",
        "llama.cpp --n-cpu-moe and LM Studio",
    ),
    "layer-stream": PolicyText(
        "Layer by layer",
        "Copies the experts of each layer as it comes and keeps none.",
        "accelerate's device_map offload",
    ),
    "cpu-only": PolicyText("CPU only", "Computes every expert on the CPU; the card is not used."),
}


def policy_text(policy: str) -> PolicyText:
    """Return what is said about a policy; one that has no text yet goes by its own name."""
    return _TEXTS.get(policy) or PolicyText(policy)


def policy_choices(policies: tuple[str, ...] = POLICIES) -> list[tuple[str, str]]:
    """Return (text, name) per policy: its label on the first line, what it is on the next."""
    return [(_choice(policy_text(name)), name) for name in policies]


def _choice(text: PolicyText) -> str:
    like = f" Like {text.like}." if text.like and text.like != text.label else ""
    like = like.replace("-", "\N{NON-BREAKING HYPHEN}")  # a command's option stays in one line
    return f"{text.label}\n{text.what}{like}".rstrip()
