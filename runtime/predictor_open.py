"""A predictor for one loaded model, with what ships for it and what was learned here before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime import predictor_files
from runtime.predictor import Predictor
from runtime.predictor_heads import Heads, heads_from
from runtime.predictor_learning import study
from runtime.predictor_online import Correction
from runtime.predictor_ranking import Curve
from runtime.predictor_reuse import RouterView
from runtime.predictor_shadow import MIN_TOKENS, Running, Shadow
from runtime.predictor_slots import Slot


class LearningPredictor(Predictor):
    """A predictor that learns in idle time and keeps what it learned in `folder`.

    `shipped` is what came with the model: what `reset` goes back to. `notices` says which files
    were ignored and why, for a person.
    """

    def __init__(
        self,
        views: Sequence[RouterView | None],
        embedding: Tensor | None,
        dtype: torch.dtype,
        shipped: Path | None,
        folder: Path | None,
    ) -> None:
        self.fingerprint = predictor_files.fingerprint(views)
        self._folder = folder
        self._facts: dict[str, Any] = {}
        self._work: Iterator[Slot | None] | None = None
        self.notices: tuple[str, ...] = ()
        heads = self._shipped_heads(shipped, views, embedding)
        super().__init__(views, embedding, dtype, heads)
        self._begin_as_shipped()
        self._take_up_learned()
        self.rebuild()

    def improve(self, budget_s: float) -> None:
        """Learn from the tokens seen lately for about `budget_s` seconds, one slot at a time.

        What is not finished goes on at the next call; with nothing left it returns at once.
        """
        until_s = time.perf_counter() + budget_s
        if self._work is None and self.memory.fresh:
            self._work = study(self.memory, self.slots, self.heads, self._residual)
        while self._work is not None:
            try:
                changed = next(self._work)
            except StopIteration:
                self._work = None
                self._save()
                return
            if changed is not None:
                self.rebuild(changed.place)
            if time.perf_counter() >= until_s:
                return

    def reset(self) -> None:
        """Forget what was learned on this machine, on disk as well."""
        self._work = None
        self.memory.clear()
        if self.past is not None:
            self.past.forget()
        self._begin_as_shipped()
        self.rebuild()
        if self._folder is not None:
            predictor_files.remove(self._folder, self._name)

    @property
    def _name(self) -> str:
        return f"predictor-{self.fingerprint}"

    def _notice(self, text: str) -> None:
        if text:
            self.notices = (*self.notices, text)

    def _shipped_heads(
        self,
        shipped: Path | None,
        views: Sequence[RouterView | None],
        embedding: Tensor | None,
    ) -> Heads | None:
        if shipped is None:
            return None
        name = predictor_files.SHIPPED_NAME
        stored, notice = predictor_files.read(shipped, name, self.fingerprint)
        self._notice(notice)
        if stored is None:
            return None
        device = next((view.weight.device for view in views if view is not None), None)
        try:
            facts = stored.facts
            heads = heads_from(
                stored.tensors,
                len(views),
                int(facts["top_k"]),
                float(facts["half_life_tokens"]),
            )
            _check(heads, views, 0 if embedding is None else embedding.shape[0])
            _ = [_key(slot) for slot in facts["slots"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._notice(f"The predictor that ships with this model is ignored: {error!r:.200}.")
            return None
        self._facts = facts
        return heads if device is None else heads.to(device)

    def _begin_as_shipped(self) -> None:
        """Set every slot to what the shipped file says, which counts as evidence."""
        known = {_key(entry): entry for entry in self._facts.get("slots", [])}
        for slot in self.slots:
            slot.forget()
            entry = known.get((slot.layer, slot.distance))
            if entry is not None:
                _take(slot, entry, MIN_TOKENS)
            slot.decide(self.heads is not None)

    def _take_up_learned(self) -> None:
        if self._folder is None:
            return
        stored, notice = predictor_files.read(self._folder, self._name, self.fingerprint)
        self._notice(notice)
        if stored is None:
            return
        try:
            known = {_key(entry): entry for entry in stored.facts["slots"]}
            for slot in self.slots:
                entry = known.get((slot.layer, slot.distance))
                if entry is None:
                    continue
                _take(slot, entry, float(entry["tokens"]))
                _restore(slot, stored.tensors, slot_device(slot, self.heads))
                slot.decide(self.heads is not None)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self._notice(f"What the predictor had learned is ignored: {error!r:.200}.")
            self._begin_as_shipped()

    def _save(self) -> None:
        if self._folder is None:
            return
        tensors: dict[str, Tensor] = {"format": torch.tensor([predictor_files.FORMAT_VERSION])}
        for slot in self.slots:
            name = f"{slot.layer}.{slot.distance}"
            found = {"head_bias": slot.head_bias}
            if slot.correction is not None:
                found |= {"bias": slot.correction.bias, "up": slot.correction.up}
                found["down"] = slot.correction.down
            tensors |= {f"{name}.{k}": t.clone() for k, t in found.items() if t is not None}
        facts = {"fingerprint": self.fingerprint, "slots": [describe(s) for s in self.slots]}
        try:
            predictor_files.write(self._folder, self._name, tensors, facts)
        except OSError as error:
            self._notice(f"What the predictor learned could not be kept: {error}.")
            self._folder = None


def describe(slot: Slot) -> dict[str, Any]:
    """Return one slot's figures as its file keeps them."""
    shadow = slot.shadow
    return {
        "layer": slot.layer,
        "distance": slot.distance,
        "learned_on": shadow.learned_on,
        "reuse_recall": round(shadow.reuse.recall, 4),
        "learned_recall": round(shadow.learned.recall, 4),
        "tokens": shadow.reuse.tokens if slot.reusable else shadow.learned.tokens,
        "reuse_curve": [slot.reuse_curve.slope, slot.reuse_curve.offset],
        "learned_curve": [slot.learned_curve.slope, slot.learned_curve.offset],
    }


def slot_device(slot: Slot, heads: Heads | None) -> torch.device:
    """Return where a slot's tensors belong."""
    if slot.view is not None:
        return slot.view.weight.device
    assert heads is not None
    return heads.tables.bias.device


def _key(entry: dict[str, Any]) -> tuple[int, int]:
    return int(entry["layer"]), int(entry["distance"])


def _take(slot: Slot, entry: dict[str, Any], tokens: float) -> None:
    reuse, learned = float(entry["reuse_recall"]), float(entry["learned_recall"])
    slot.shadow = Shadow(
        Running(reuse, tokens), Running(learned, tokens), bool(entry.get("learned_on", False))
    )
    slot.reuse_curve = Curve(*map(float, entry["reuse_curve"]))
    slot.learned_curve = Curve(*map(float, entry["learned_curve"]))


def _restore(slot: Slot, tensors: dict[str, Tensor], device: torch.device) -> None:
    name = f"{slot.layer}.{slot.distance}"

    def tensor(part: str, *shape: int) -> Tensor | None:
        found = tensors.get(f"{name}.{part}")
        if found is None:
            return None
        if found.dim() != len(shape) or any(
            want not in (-1, got) for want, got in zip(shape, found.shape, strict=True)
        ):
            raise ValueError(f"{name}.{part} has the shape {tuple(found.shape)}")
        return found.to(device=device, dtype=torch.float32)

    slot.head_bias = tensor("head_bias", slot.experts)
    bias = tensor("bias", slot.experts)
    if bias is not None and slot.view is not None:
        width = slot.view.weight.shape[1]
        slot.correction = Correction(
            bias, tensor("up", slot.experts, -1), tensor("down", -1, width)
        )


def _check(heads: Heads, views: Sequence[RouterView | None], vocabulary: int) -> None:
    """Refuse heads whose shapes do not fit the model or each other.

    Raises:
        ValueError: names what does not fit.
    """
    tables, known = heads.tables, next((view for view in views if view is not None), None)
    layers, experts, width = len(views), heads.experts, tables.bias.shape[-1]
    if known is not None and (known.experts, known.top_k) != (experts, heads.top_k):
        raise ValueError(f"it is for {experts} experts, top {heads.top_k}")
    if not 0 < vocabulary <= tables.token.shape[0]:
        raise ValueError(f"it knows {tables.token.shape[0]} tokens of {vocabulary}")
    n = heads.inner
    expected: dict[str, tuple[int, ...]] = {
        "bias": (layers, width),
        "past": (layers, experts, 2, width),
        "previous": (tables.token.shape[0], width),
        "token": (tables.token.shape[0], layers, width),
    }
    for number, head in enumerate(heads.places):
        r = head.compress.shape[0]
        hidden = known.weight.shape[1] if known is not None else head.compress.shape[1]
        expected |= {
            f"{number}.compress": (r, hidden),
            f"{number}.first": (width, r),
            f"{number}.first.scales": (width,),
            f"{number}.second": (width - n, n),
            f"{number}.second.scales": (width - n,),
            f"{number}.routed": (experts, width),
            f"{number}.gate": (n, r),
            f"{number}.gate.scales": (n,),
            f"{number}.inner": (n, n),
            f"{number}.inner.scales": (n,),
        }
    for name, tensor in heads.tensors().items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"{name} has the shape {tuple(tensor.shape)}")
    if width - n != 2 * experts:
        raise ValueError(f"it scores {width - n} experts, not {2 * experts}")
