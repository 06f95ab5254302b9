"""What is done in idle time with the tokens last seen: judge both predictions, fit, correct."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.predictor_heads import Heads, score
from runtime.predictor_memory import Memory
from runtime.predictor_online import Correction, Trial, fit_curve, learn, recalled
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


def correct(slot: Slot, looks: Looks, fresh: int) -> bool:
    """Try or learn a correction of the prediction in use; return whether what is used changed.

    The newest `fresh` tokens judge the one on probation, which has not seen them; then it is used,
    dropped or kept waiting. Where none is on probation, one is learned.
    """
    learned_on = slot.shadow.learned_on
    raw = looks.learned if learned_on else looks.reuse
    if raw is None or not fresh:
        return False
    if slot.trial is None:
        slot.trial = _learned(slot, looks, raw)
        return False
    now, x, chosen = _in_use(slot), looks.x[-fresh:], looks.chosen[-fresh:]
    plain = raw[-fresh:]
    tried, used = (
        recalled(_scored(slot, plain, x, one), chosen, slot.top_k)
        for one in (slot.trial.correction, now)
    )
    slot.trial.add(tried, used)
    verdict = slot.trial.verdict
    if verdict is None:
        return False
    made, slot.trial = slot.trial.correction, None
    if verdict and learned_on:
        slot.head_bias = made.bias
    elif verdict:
        slot.correction = made
    else:
        slot.trial = _learned(slot, looks, raw)
    return verdict


def _learned(slot: Slot, looks: Looks, raw: Tensor) -> Trial | None:
    """Learn a correction from all tokens kept; a router's matrix is corrected too, a head's not."""
    learned_on = slot.shadow.learned_on
    made = learn(
        raw,
        looks.x,
        looks.chosen,
        _in_use(slot),
        lambda logits: _ranked_by(slot, logits),
        slot.curve.slope,
        not learned_on,
    )
    return None if made is None else Trial(made)


def _in_use(slot: Slot) -> Correction | None:
    if slot.shadow.learned_on:
        return None if slot.head_bias is None else Correction(slot.head_bias)
    return slot.correction


def _ranked_by(slot: Slot, logits: Tensor) -> Tensor:
    if slot.shadow.learned_on or slot.view is None:
        return logits
    return slot.view.scored(logits)


def _scored(slot: Slot, raw: Tensor, x: Tensor, correction: Correction | None) -> Tensor:
    return _ranked_by(slot, raw if correction is None else raw + correction.added(x))


def study(
    memory: Memory,
    slots: Sequence[Slot],
    heads: Heads | None,
    residual: Callable[[Tensor], Tensor],
) -> Iterator[Slot | None]:
    """Go through all slots with the tokens not looked at yet; every step is one slot.

    Each is judged and then corrected. Yields the slot if what it is guessed with has changed.
    """
    fresh = memory.fresh
    memory.taken()
    for slot in slots:
        if not len(memory):
            return
        looks = look(memory, slot, heads, residual)
        before = slot.shadow.learned_on
        judge(slot, looks, fresh)
        flipped = slot.shadow.learned_on != before
        if flipped:
            slot.trial = None  # it was to correct the other prediction
        yield slot if correct(slot, looks, fresh) or flipped else None


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
