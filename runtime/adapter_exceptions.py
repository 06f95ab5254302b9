"""The families whose experts lack the common interface and are given it here: three small classes.

Each is a subclass of the family's own, so that all else stays as it is, and each ends in the same
call as every other family's experts. They take the places of the originals only while a model is
built (`stand_ins`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from runtime.kernels import combine

_MODELS = "transformers.models"


def stand_ins() -> dict[type[nn.Module], type[nn.Module]]:
    """Return what replaces which class of those families whose modelling code is imported."""
    found: dict[type[nn.Module], type[nn.Module]] = {}
    for module_name, makers in _MAKERS.items():
        module = sys.modules.get(f"{_MODELS}.{module_name}")
        for name, make in makers.items() if module is not None else ():
            original = _originals(module).get(name)
            if original is not None:
                found[original] = make(original)
    return found


def original_of(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the family's own class behind a stand-in or what was derived of it, else `kind`."""
    original: type[nn.Module] = getattr(kind, "prescope_original", kind)
    return original


def _originals(module: Any) -> dict[str, type[nn.Module]]:
    """Return the classes of a modelling module, also while stand-ins are in their places."""
    return {
        name: original_of(kind) for name, kind in vars(module).items() if isinstance(kind, type)
    }


@cache
def _llama4_experts(original: Any) -> type[nn.Module]:
    return _experts(original, "Llama4TextExperts", is_transposed=True)


@cache
def _llama4_block(original: Any) -> type[nn.Module]:
    """Llama 4 scales what goes into an expert, not what comes out.

    The stock block runs every expert on every token, those not chosen on zeros.
    """

    class Llama4TextMoe(original):  # type: ignore[misc]
        prescope_original = original

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
            """Map (..., hidden) to (tokens, hidden) and the router's logits (tokens, experts)."""
            hidden = hidden_states.reshape(-1, self.hidden_dim)
            scores, logits = self.router(hidden)
            index = logits.topk(self.top_k, dim=1).indices
            # Every (k, token) is a row of its own, in the order in which `eager` gathers them.
            flat = index.T.reshape(-1, 1)
            scaled = hidden.repeat(self.top_k, 1) * scores.gather(1, index).T.reshape(-1, 1)
            rows = self.experts(scaled, flat, torch.ones_like(flat, dtype=hidden.dtype))
            by_token = rows.view(self.top_k, *hidden.shape).transpose(0, 1).flatten(0, 1)
            out = self.shared_expert(hidden)
            out.add_(combine(by_token, index, hidden.dtype))
            return out, logits

    return Llama4TextMoe


@cache
def _longcat_experts(original: Any) -> type[nn.Module]:
    """LongCat has experts without weights, numbered after the others, that return their input."""

    class LongcatFlashExperts(original):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            # Stock allocates rows for the experts without weights too.
            stock: Tensor = self._parameters["gate_up_proj"]
            shape = (self.num_routed_experts, *stock.shape[1:])
            self._parameters["gate_up_proj"] = nn.Parameter(stock.new_empty(shape))

    dispatching: Any = _experts(LongcatFlashExperts, "LongcatFlashExperts", original)

    class Gathered(dispatching):  # type: ignore[misc]
        def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            """Map (tokens, hidden), (tokens, k), (tokens, k) to (tokens, hidden)."""
            if hidden_states.device.type == "meta":
                return torch.empty_like(hidden_states)
            tokens, k = index.shape
            flat, by_k = index.T.reshape(-1), weights.T.reshape(-1, 1)
            rows = hidden_states.repeat(k, 1)
            routed = (flat < self.num_routed_experts).nonzero().squeeze(1)
            made = rows * by_k
            if len(routed):
                computed = super().forward(rows[routed], flat[routed, None], by_k[routed])
                made[routed] = computed.to(made.dtype)
            else:
                # Sequences meet at every layer: one that did not come would break the meeting.
                super().forward(rows[:1], torch.zeros_like(flat[:1, None]), by_k[:1])
            made = made.to(hidden_states.dtype).view(k, tokens, -1).transpose(0, 1).flatten(0, 1)
            return combine(made, index, hidden_states.dtype)

    Gathered.__name__ = Gathered.__qualname__ = original.__name__
    return Gathered


@cache
def _step3p7_experts(original: Any) -> type[nn.Module]:
    return _experts(original, "Step3p7Experts")


def _experts(base: Any, name: str, original: Any = None, **flags: Any) -> type[nn.Module]:
    kind: Any = type(
        name,
        (base,),
        {
            "__module__": base.__module__,
            "prescope_original": original or base,
        },
    )
    decorated: type[nn.Module] = use_experts_implementation(kind, **flags)
    return decorated


_MAKERS: dict[str, dict[str, Callable[[Any], type[nn.Module]]]] = {
    "llama4.modeling_llama4": {
        "Llama4TextExperts": _llama4_experts,
        "Llama4TextMoe": _llama4_block,
    },
    "longcat_flash.modeling_longcat_flash": {"LongcatFlashExperts": _longcat_experts},
    "step3p7.modeling_step3p7": {"Step3p7Experts": _step3p7_experts},
}
