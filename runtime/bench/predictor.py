"""`bench predictor`: how well the next layers' experts are guessed, on chats nothing learned from.

The same held-out chats are replayed with router reuse and with the learned heads that ship, each as
it is and as in the app, learning between answers. Means are over the layers that are guessed
from a layer; the first two layers, guessed from tokens, are told apart.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from runtime import predictor_files
from runtime.adapter_routers import survey_routers
from runtime.bench.predictor_reading import (
    CHATS,
    Reading,
    open_in_place,
    read_chats,
    read_through,
    share_of_a_token,
)
from runtime.bench.predictor_replay import Tallies, replay
from runtime.config import DEFAULT_MODEL, model_folder
from runtime.core import EmulatedMachine
from runtime.errors import UnsupportedModelError
from runtime.loader import LoadedModel
from runtime.predictor import Predictor
from runtime.predictor_open import LearningPredictor

CACHE_FRACTION = 0.25
CHATS_USED = 78
IDLE_S = 60.0  # enough for all there is to learn, so that the figures do not depend on speed
TIMED_TOKENS = 40
TARGETS = {"1": 0.80, "2": 0.72}
MAX_SHARE = 0.01
_VARIANTS = ("router_reuse", "router_reuse_online", "learned", "learned_online")


def run(options: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the figures of every (layer, distance) and their means.

    Raises:
        ModelError: the model cannot be opened, or no router of it could be understood.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    opened = open_in_place(model_folder(options.model))
    try:
        return _measure(opened, options, say)
    finally:
        opened.store.close()
        torch.set_num_threads(threads)


def _measure(
    opened: LoadedModel, options: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, Any]:
    survey = survey_routers(opened.model, opened.layers)
    if not any(survey.views):
        raise UnsupportedModelError(
            f"No router of this model could be understood: {survey.reasons[0]}.",
            "Prediction stays off for this model; it runs without.",
        )
    chats = read_chats(model_folder(DEFAULT_MODEL).parent / "traces" / CHATS)[:CHATS_USED]
    say(f"Reading {len(chats)} held-out chats\n")
    readings = read_through(opened, chats)
    folder = model_folder(options.model)
    dtype = opened.model.dtype
    fraction = options.cache_fraction or CACHE_FRACTION
    slots = max(opened.shape.top_k, round(fraction * opened.shape.expert_count))
    tallies: dict[str, Tallies] = {}
    with tempfile.TemporaryDirectory() as learned:
        predictors: dict[str, Predictor] = {
            "router_reuse": Predictor(survey.views, survey.embedding, dtype),
            "router_reuse_online": LearningPredictor(
                survey.views, survey.embedding, dtype, None, None
            ),
            "learned": LearningPredictor(survey.views, survey.embedding, dtype, folder, None),
            "learned_online": LearningPredictor(
                survey.views, survey.embedding, dtype, folder, Path(learned)
            ),
        }
        for name, predictor in predictors.items():
            say(f"Replaying {name.replace('_', ' ')}\n")
            idle_s = IDLE_S if name.endswith("_online") else 0.0
            tallies[name] = replay(predictor, readings, slots, idle_s)
        ours = predictors["learned_online"]
        own_s, token_s = _time(opened, ours, readings)
    facts = _facts(folder, ours)
    return {
        "model": options.model,
        "chats": len(readings),
        "decoded_tokens": sum(reading.decoded for reading in readings),
        "cache_fraction": fraction,
        "layers": _layers(tallies, ours, facts, opened.shape.top_k),
        "summary": {
            "recall_at_k": _means(tallies["learned_online"], "recall_at_k"),
            "router_reuse_recall_at_k": _means(tallies["router_reuse"], "recall_at_k"),
            "router_reuse_online_recall_at_k": _means(
                tallies["router_reuse_online"], "recall_at_k"
            ),
            "learned_recall_at_k": _means(tallies["learned"], "recall_at_k"),
            "recall_at_2k": _means(tallies["learned_online"], "recall_at_2k"),
            "recall_from_tokens": _from_tokens(tallies["learned_online"]),
            "router_reuse_recall_from_tokens": _from_tokens(tallies["router_reuse"]),
            "router_reuse_online_recall_from_tokens": _from_tokens(tallies["router_reuse_online"]),
            "recall_of_misses": _means(tallies["learned_online"], "recall_of_misses"),
            "router_reuse_recall_of_misses": _means(tallies["router_reuse"], "recall_of_misses"),
            "precision": _means(tallies["learned_online"], "precision_of_misses"),
            "router_reuse_precision": _means(tallies["router_reuse"], "precision_of_misses"),
            **_cost(opened, ours),
            "cost_share_of_token_cpu": own_s / token_s,
            "predictor_s_per_token_cpu": own_s,
            "token_s_cpu": token_s,
            "seeds": _seeds(facts),
            "notices": list(getattr(ours, "notices", ())),
        },
    }


def tell(result: dict[str, Any]) -> str:
    """Put the figures into words."""
    s = result["summary"]
    lines = [
        f"{result['decoded_tokens']} decoded tokens of {result['chats']} held-out chats, a cache of"
        f" {result['cache_fraction']:.0%} of the experts.",
        "layer distance  reuse@k online@k learned@k online@k   @2k  misses  precision  in use",
    ]
    for row in result["layers"]:
        reuse, reuse_online, learned, online = (row.get(name) for name in _VARIANTS)
        lines.append(
            f"{row['layer']:5} {row['distance']:8}  {_part(reuse, 'recall_at_k')}"
            f"    {_part(reuse_online, 'recall_at_k')}"
            f"    {_part(learned, 'recall_at_k')}    {_part(online, 'recall_at_k')}"
            f"  {_part(online, 'recall_at_2k')}   {_part(online, 'recall_of_misses')}"
            f"     {_part(online, 'precision_of_misses')}  {row['in_use']}"
        )
    for distance, wanted in TARGETS.items():
        got = s["recall_at_k"].get(distance, 0.0)
        met = "met" if got >= wanted else "not met"
        reused = s["router_reuse_recall_at_k"].get(distance, 0.0)
        lines.append(
            f"Recall at k, {distance} ahead: {got:.3f} (router reuse {reused:.3f};"
            f" target {wanted:.2f}: {met})"
        )
    share = s["cost_share_of_token"]
    met = "met" if share <= MAX_SHARE else "not met"
    lines.append(
        f"Bytes read: {share:.2%} of a token's weights (target 1 %: {met});"
        f" on this CPU {s['cost_share_of_token_cpu']:.1%} of a token's time."
    )
    return "\n".join([*lines, *s["notices"]]) + "\n"


def _part(figures: dict[str, float] | None, name: str) -> str:
    return "   - " if figures is None else f"{figures[name]:.3f}"


def _layers(
    tallies: dict[str, Tallies], ours: Predictor, facts: dict[str, Any], top_k: int
) -> list[dict[str, Any]]:
    groups: Sequence[str] = facts.get("training", {}).get("groups", ())
    rows = []
    for slot in ours.slots:
        key = (slot.layer, slot.distance)
        place = slot.place
        rows.append(
            {
                "layer": slot.layer,
                "distance": slot.distance,
                "guessed_from": "tokens" if place == 0 else place - 1,
                "group": groups[place - 1] if 0 < place <= len(groups) else "near input",
                "in_use": "learned" if slot.shadow.learned_on else "router reuse",
                **{
                    name: tallies[name][key].figures(top_k)
                    for name in _VARIANTS
                    if key in tallies[name]
                },
            }
        )
    return sorted(rows, key=lambda row: (row["distance"], row["layer"]))


def _means(tallies: Tallies, name: str) -> dict[str, float]:
    """Mean over the layers that are guessed from a layer, per distance."""
    found = {}
    for distance in (1, 2):
        values = [
            tally.figures(1)[name]
            for (layer, d), tally in tallies.items()
            if d == distance and layer >= distance
        ]
        if values:
            found[str(distance)] = sum(values) / len(values)
    return found


def _from_tokens(tallies: Tallies) -> dict[str, float]:
    return {
        str(layer): tally.figures(1)["recall_at_k"]
        for (layer, distance), tally in sorted(tallies.items())
        if layer < distance
    }


def _cost(opened: LoadedModel, predictor: Predictor) -> dict[str, float]:
    """The predictor's share of a token: of the bytes it reads, and of its time on a card.

    The card is the emulated one with every expert resident, the shortest token there can be.
    """
    shape, model = opened.shape, opened.model
    dense = shape.dense_bytes
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if outputs is not None and outputs.weight is not inputs.weight:
        dense -= inputs.weight.nbytes  # one row of the table is read
    experts = shape.layers * shape.top_k * shape.expert_bytes
    own = predictor.weight_bytes * shape.layers
    card = EmulatedMachine()
    token_s = shape.layers * (card.device_layer_s + card.host_layer_s)
    token_s += experts / card.device_bytes_per_s
    return {
        "predictor_bytes_per_token": float(own),
        "token_weight_bytes": float(dense + experts),
        "cost_share_of_token": own / (dense + experts),
        "cost_share_of_token_time": own / card.device_bytes_per_s / token_s,
    }


def _time(
    opened: LoadedModel, predictor: Predictor, readings: Sequence[Reading]
) -> tuple[float, float]:
    longest = max(readings, key=lambda reading: reading.decoded)
    share_of_a_token(opened, predictor, longest, 4)  # warm up
    return share_of_a_token(opened, predictor, longest, TIMED_TOKENS)


def _facts(folder: Path, predictor: Predictor) -> dict[str, Any]:
    if predictor.heads is None:
        return {}
    name = predictor_files.SHIPPED_NAME
    stored, _ = predictor_files.read(folder, name, predictor_files.fingerprint(predictor.views))
    return stored.facts if stored is not None else {}


def _seeds(facts: dict[str, Any]) -> dict[str, Any]:
    """What training with several seeds gave on held-out chats, and whether the floor is met.

    The floor: every layer group above router reuse by more than the spread over the seeds.
    """
    runs = facts.get("training", {}).get("seeds", [])
    if not runs:
        return {}
    groups: Sequence[str] = facts["training"]["groups"]
    reuse = {
        (slot["layer"], slot["distance"]): slot["reuse_recall"]
        for slot in facts["held_out"]["slots"]
    }
    found: dict[str, Any] = {}
    for group in dict.fromkeys(groups):
        means, reused = [], []
        for one in runs:
            mine = [
                (recall, reuse[layer, distance])
                for layer, distance, recall in one["held_out_slots"]
                if layer >= distance and groups[layer - distance] == group
            ]
            means.append(sum(recall for recall, _ in mine) / len(mine))
            reused.append(sum(other for _, other in mine) / len(mine))
        spread = max(means) - min(means)
        found[group] = {
            "recall_at_k": means,
            "router_reuse_recall_at_k": reused[0],
            "spread": spread,
            "floor_met": min(means) - reused[0] > spread,
        }
    return {"runs": len(runs), "groups": found}
