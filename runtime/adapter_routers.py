"""Finding out what each MoE layer's router does, by watching and asking the model itself.

No family is assumed. One short pass shows which norm's output a router sees; the norm is asked for
its gain and the router for its choices on random inputs, and only what reproduces them counts. A
layer where something does not fit has no router view, and a reason.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from runtime.adapter import MoeLayer, Run, attach, detach
from runtime.adapter_config import REFUSALS
from runtime.predictor_reuse import SCORINGS, RouterView

AGREEMENT = 0.95
"""The share of a router's own choices that a view must reproduce to be used."""

_SURE = 0.9999
_PROBE_TOKENS = 3
_ROWS = 128
_REMEMBERED_OUTPUTS = 64
_NORM_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class RouterSurvey:
    """What was found: a view per MoE layer or None, and why not ("" where there is one).

    `embedding` is (vocabulary, hidden), what the first layer's residual starts from; None where
    the model has no plain table.
    """

    views: tuple[RouterView | None, ...]
    reasons: tuple[str, ...]
    embedding: Tensor | None


@dataclass
class _Seen:
    """What one router was called with in the probing pass, and what may have made its input."""

    router_input: Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]
    candidates: list[nn.Module]
    batched: bool
    experts_input: Tensor | None = None


def survey_routers(model: nn.Module, layers: Sequence[MoeLayer]) -> RouterSurvey:
    """Describe the routers of a loaded model; a few hundred rows are computed on its device.

    May be called before or after the layers were attached; never while a pass is running.
    """
    with torch.no_grad():
        try:
            seen = _watch(model, layers)
        except REFUSALS as error:
            reason = f"its probing pass failed: {error!s:.200}"
            return RouterSurvey((None,) * len(layers), (reason,) * len(layers), None)
        found = [_view(layer, seen.get(layer.index)) for layer in layers]
    return RouterSurvey(
        views=tuple(view for view, _ in found),
        reasons=tuple(reason for _, reason in found),
        embedding=_embedding(model),
    )


def _watch(model: Any, layers: Sequence[MoeLayer]) -> dict[int, _Seen]:
    """Run a few tokens through the model, its experts answering zeros, and note what passes."""
    seen: dict[int, _Seen] = {}
    recent: deque[tuple[nn.Module, Tensor]] = deque(maxlen=_REMEMBERED_OUTPUTS)
    hooks = []

    def remember(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            recent.append((module, output))

    def before_router(index: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            if args and isinstance(args[0], Tensor):
                rows = args[0].reshape(-1, args[0].shape[-1])
                made = [m for m, out in reversed(recent) if _same_rows(out, rows)]
                batched = args[0].dim() == 3
                seen[index] = _Seen(rows.clone(), args[1:], dict(named), made, batched)

        return note

    def answer_zeros(layer: int, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if layer in seen:
            seen[layer].experts_input = hidden.clone()
        return torch.zeros_like(hidden)

    attached: list[Run | None] = [layer.module.__dict__.get("prescope_run") for layer in layers]
    attach(layers, answer_zeros)
    try:
        hooks += [module.register_forward_hook(remember) for module in model.modules()]
        for layer in layers:
            if layer.router is not None:
                hook = before_router(layer.index)
                hooks.append(layer.router.register_forward_pre_hook(hook, with_kwargs=True))
        ids = torch.arange(1, _PROBE_TOKENS + 1, device=model.device).unsqueeze(0)
        model(input_ids=ids, use_cache=False)
    finally:
        for handle in hooks:
            handle.remove()
        detach(layers)
        for layer, run in zip(layers, attached, strict=True):
            if run is not None:
                attach([layer], run)
    return seen


def _same_rows(output: Tensor, rows: Tensor) -> bool:
    return output.numel() == rows.numel() and torch.equal(output.reshape(rows.shape), rows)


def _view(layer: MoeLayer, seen: _Seen | None) -> tuple[RouterView | None, str]:
    """Return a checked view of one layer's router, or None and the reason."""
    if layer.router is None or seen is None:
        return None, "it has no router that was called"
    if seen.experts_input is None or not _same_rows(seen.experts_input, seen.router_input):
        return None, "its experts do not see what its router sees"
    width = seen.router_input.shape[-1]
    gains = (_gain(module, width, seen.router_input) for module in seen.candidates)
    gain = next((gain for gain in gains if gain is not None), None)
    if gain is None:
        return None, "no root-mean-square norm makes its router's input"
    x = _random_rows(_ROWS, width, seen.router_input) * gain.to(seen.router_input.dtype)
    try:
        asked = x.unsqueeze(0) if seen.batched else x
        chosen = layer.router.forward(asked, *seen.rest, **seen.named)[2]
        chosen = chosen.reshape(_ROWS, -1)
        wanted = torch.zeros(_ROWS, layer.experts, device=x.device).scatter_(1, chosen, 1.0)
    except REFUSALS as error:
        return None, f"its router cannot be asked: {error!s:.200}"
    return _fitting_view(layer, seen, gain, x, wanted, chosen.shape[1])


def _gain(norm: nn.Module, width: int, like: Tensor) -> Tensor | None:
    """Return the gain (hidden,) in float32 of a root-mean-square norm, None if it is not one."""
    x = _random_rows(_ROWS, width, like)
    unit = x.float() * x.float().square().mean(-1, keepdim=True).rsqrt()
    try:
        made, scaled = norm(x), norm(x * 16)
    except REFUSALS:
        return None
    for out in (made, scaled):
        if not isinstance(out, Tensor) or out.shape != x.shape:
            return None
    made, scaled = made.float(), scaled.float()
    gain = (made * unit).sum(0) / unit.square().sum(0)
    limit = _NORM_TOLERANCE.get(like.dtype, 1e-3) * float(gain.abs().mean())
    fits = all(float((out - unit * gain).abs().mean()) <= limit for out in (made, scaled))
    return gain if fits and limit > 0 else None


def _fitting_view(
    layer: MoeLayer, seen: _Seen, gain: Tensor, x: Tensor, wanted: Tensor, top_k: int
) -> tuple[RouterView | None, str]:
    """Try every way of ranking by the tensors the router uses; the one that fits best is taken."""
    width = x.shape[-1]
    assert layer.router is not None
    matrices = [p for p in layer.router.parameters() if tuple(p.shape) == (layer.experts, width)]
    # Some routers are handed their bias by the block that owns it.
    own = (*layer.router.parameters(), *layer.router.buffers(), *seen.rest, *seen.named.values())
    tensors = {id(t): t for t in own if isinstance(t, Tensor) and t.numel() == layer.experts}
    rows: list[Tensor | None] = [None, *(t.detach().reshape(-1) for t in tensors.values())]
    best, best_view = 0.0, None
    for weight, scoring, selection, bias in product(matrices, SCORINGS, rows, rows):
        if scoring == "softmax" and selection is None:
            continue  # the same order as that of the logits
        view = RouterView(top_k, weight, bias, gain, scoring, selection)
        logits = x.float() @ weight.float().T + (0.0 if bias is None else bias.float())
        picked = torch.zeros_like(wanted).scatter_(1, view.scored(logits).topk(top_k)[1], 1.0)
        agreement = float((picked * wanted).sum() / wanted.sum())
        if agreement > best:
            best, best_view = agreement, view
        if best > _SURE:
            break
    if best >= AGREEMENT:
        return best_view, ""
    return None, (
        f"its router does not rank experts by one score each: at most {best:.0%} of its choices"
        " are reproduced"
    )


def _random_rows(rows: int, width: int, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(rows, width, generator=generator)
    return x.to(device=like.device, dtype=like.dtype)


def _embedding(model: Any) -> Tensor | None:
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None
