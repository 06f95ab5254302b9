"""What is done in idle time with the tokens last seen: judge both predictions, fit, correct."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.predictor_heads import Heads, score
from runtime.predictor_memory import Memory
from runtime.predictor_online import Correction, fit_curve, learn, recalled
from runtime.predictor_slots import Slot

_MIN_ROWS_FOR_CURVES = 64


@dataclass(frozen=True)
class Looks:
    """One slot on the tokens kept: `x` (rows, hidden), `chosen` (rows, k), and raw scores of both
    predictions without what was learned here, None where there is no such prediction."""

    x: Tensor
    chosen: Tensor
    reuse: Tensor | None
    learned: Tensor | None


def look(
    memory: Memory, slot: Slot, heads: Heads | None, residual: Callable[[Tensor], Tensor]
) -> Looks:
    """Compute both predictions of one slot for every token kept; `residual` maps token ids."""
    place = slot.place
    with torch.no_grad():
        x = memory.inputs(place - 1) if place else residual(memory.tokens())
        reuse = None
        if slot.reusable:
            reuse = x.float() @ slot.folded().T + slot.own_bias()
        learned = None
        bases = memory.bases(place) if heads is not None else None
        if heads is not None and bases is not None:
            seen = x if place else memory.states()
            index = memory.chosen(place - 1) if place else None
            weights = memory.weights(place - 1) if place else None
            both = score(heads.places[place], bases, seen, index, weights)
            learned = both[:, (slot.distance - 1) * slot.experts :][:, : slot.experts]
        return Looks(x.float(), memory.chosen(slot.layer), reuse, learned)


def judge(slot: Slot, looks: Looks, fresh: int) -> None:
    """Add the newest `fresh` tokens to the slot's evidence, decide, and fit the curves."""
    corrected = _corrected(slot, looks)
    for running, scores in zip((slot.shadow.reuse, slot.shadow.learned), corrected, strict=True):
        if scores is not None and fresh:
            found = recalled(scores[-fresh:], looks.chosen[-fresh:], slot.top_k)
            running.add(float(found.mean()), fresh)
    slot.decide(looks.learned is not None)
    if len(looks.chosen) >= _MIN_ROWS_FOR_CURVES:
        reuse, learned = corrected
        if reuse is not None:
            slot.reuse_curve = fit_curve(reuse, looks.chosen, slot.reuse_curve)
        if learned is not None:
            slot.learned_curve = fit_curve(learned, looks.chosen, slot.learned_curve)


def correct(slot: Slot, looks: Looks, until_s: float) -> bool:
    """Learn a correction of the prediction in use; return whether a better one was found."""
    if slot.shadow.learned_on:
        if looks.learned is None:
            return False
        start = None if slot.head_bias is None else Correction(slot.head_bias)
        slope = slot.learned_curve.slope
        made = learn(
            looks.learned,
            looks.x,
            looks.chosen,
            start,
            lambda logits: logits,
            slope,
            low_rank=False,
            until_s=until_s,
        )
        if made is not None:
            slot.head_bias = made.bias
        return made is not None
    if looks.reuse is None or slot.view is None:
        return False
    made = learn(
        looks.reuse,
        looks.x,
        looks.chosen,
        slot.correction,
        slot.view.scored,
        slot.reuse_curve.slope,
        low_rank=True,
        until_s=until_s,
    )
    if made is not None:
        slot.correction = made
    return made is not None


def improve(
    memory: Memory,
    slots: Sequence[Slot],
    heads: Heads | None,
    residual: Callable[[Tensor], Tensor],
    until_s: float,
) -> bool:
    """Judge every slot on the tokens not looked at yet, then correct as many as time allows.

    Returns whether anything that is in use changed. `until_s` is a `time.perf_counter()`.
    """
    if not memory.fresh:
        return False
    fresh, changed = memory.fresh, False
    looked = []
    for slot in slots:
        looks = look(memory, slot, heads, residual)
        judge(slot, looks, fresh)
        looked.append((slot, looks))
    memory.taken()
    # The worst first: where most is missed there is most to learn.
    looked.sort(key=lambda pair: max(pair[0].shadow.reuse.recall, pair[0].shadow.learned.recall))
    for slot, looks in looked:
        if time.perf_counter() >= until_s:
            break
        changed = correct(slot, looks, until_s) or changed
    return changed


def _corrected(slot: Slot, looks: Looks) -> tuple[Tensor | None, Tensor | None]:
    """Return both predictions' scores as they would be used."""
    reuse, learned = looks.reuse, looks.learned
    if reuse is not None:
        assert slot.view is not None
        if slot.correction is not None:
            reuse = reuse + slot.correction.added(looks.x)
        reuse = slot.view.scored(reuse)
    if learned is not None and slot.head_bias is not None:
        learned = learned + slot.head_bias
    return reuse, learned
