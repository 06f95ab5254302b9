"""Write the predictor that ships with a model: its packed heads and what was measured of them.

Figures that decide at run time come from validation rows, which nothing was trained on; held-out
figures are for people.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from assets.training.predictor_data import Routing
from assets.training.predictor_net import Network, Rows, packed_scores
from runtime import predictor_files
from runtime.predictor_heads import Heads
from runtime.predictor_online import fit_curve, recalled
from runtime.predictor_open import describe
from runtime.predictor_reuse import RouterView, unit_rms
from runtime.predictor_shadow import MIN_TOKENS, Running, Shadow
from runtime.predictor_slots import Slot, make_slots


def views_of(routers: torch.Tensor, gains: torch.Tensor, top_k: int) -> list[RouterView]:
    """The default model's routers as the runtime sees them."""
    return [RouterView(top_k, w, None, g) for w, g in zip(routers, gains, strict=True)]


def judged_slots(
    heads: Heads, views: list[RouterView], embedding: torch.Tensor, rows: Rows
) -> list[Slot]:
    """Every slot with both recalls at k and both curves on `rows`, and what is used by them."""
    slots = list(make_slots(views, has_embedding=True, heads=heads))
    learned = packed_scores(heads, rows)
    for slot in slots:
        chosen = rows.chosen[:, slot.layer]
        residual = unit_rms(embedding[rows.tokens])
        x = rows.inputs[:, slot.place - 1].float() if slot.place else residual
        scores = (x @ slot.folded().T, learned[slot.place][:, slot.distance - 1])
        reuse, mine = (float(recalled(one, chosen, slot.top_k).mean()) for one in scores)
        slot.shadow = Shadow(Running(reuse, MIN_TOKENS), Running(mine, MIN_TOKENS))
        slot.reuse_curve = fit_curve(scores[0], chosen, slot.reuse_curve)
        slot.learned_curve = fit_curve(scores[1], chosen, slot.learned_curve)
        slot.decide(has_learned=True)
    return slots


def means(slots: list[Slot]) -> dict[str, dict[str, float]]:
    """Mean recall at k per distance, targets guessed from tokens left out."""
    found: dict[str, dict[str, float]] = {"learned": {}, "reuse": {}}
    for distance in (1, 2):
        mine = [slot.shadow for slot in slots if slot.distance == distance and slot.place]
        for name in found:
            values = [getattr(shadow, name).recall for shadow in mine]
            found[name][str(distance)] = round(sum(values) / len(values), 4)
    return found


def write(
    folder: Path,
    network: Network,
    views: list[RouterView],
    embedding: torch.Tensor,
    validation: Rows,
    held_out: Rows,
    training: dict[str, Any],
) -> dict[str, Any]:
    """Write both files into `folder` and return the facts."""
    heads = network.heads(views[0].top_k)
    unseen = judged_slots(heads, views, embedding, held_out)
    facts = {
        "fingerprint": predictor_files.fingerprint(views),
        "top_k": heads.top_k,
        "half_life_tokens": heads.tables.half_life_tokens,
        "bytes_per_token": heads.bytes_per_token(),
        "training": training,
        "held_out": {
            "mean_recall_at_k": means(unseen),
            "slots": [
                {
                    "layer": slot.layer,
                    "distance": slot.distance,
                    "reuse_recall": round(slot.shadow.reuse.recall, 4),
                    "learned_recall": round(slot.shadow.learned.recall, 4),
                }
                for slot in unseen
            ],
        },
        "slots": [describe(slot) for slot in judged_slots(heads, views, embedding, validation)],
    }
    predictor_files.write(folder, predictor_files.SHIPPED_NAME, network.tensors(heads.top_k), facts)
    return facts


def split(data: Routing, validation_rows: int) -> tuple[Routing, Routing]:
    """Rows to learn from and rows to judge by; chats may be cut, by one."""
    border = len(data) - validation_rows
    return data.rows(0, border), data.rows(border)
