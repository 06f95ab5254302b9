"""The one seam into transformers' models: its experts interface, registered once as "prescope".

An experts module keeps its flags, activation and norm, but not its weights: `stripped_experts`
makes `from_pretrained` build modules without them, `find_moe_layers` describes what is left, and
`attach` sends every call to one function.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from runtime.errors import UnsupportedModelError
from runtime.formats import DTYPE_BYTES, ExpertFormat, lay_out
from runtime.kernels import Accumulate, ExpertMath

IMPLEMENTATION = "prescope"
PARTS = (
    "gate_up_proj",
    "up_proj",
    "gate_up_proj_bias",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
)
Run = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""run(layer index, hidden (T, H), top-k index (T, k), top-k weights (T, k)) -> (T, H)"""

# Where `eager` does not add rows in the dtype of the hidden states.
_ACCUMULATE: dict[str, Accumulate] = {
    "NemotronHExperts": "weights",
    "Inkling2Experts": "float32",
    "OpenAIPrivacyFilterExperts": "float32",
}
_IN_FLOAT32 = {"OpenAIPrivacyFilterExperts"}
_NOT_OURS = {
    "dbrx": "its experts share one flat matrix",
    "doge": "its experts are rows of an embedding",
    "jetmoe": "its attention is made of experts too",
    "llama4": "its router scales the input of the experts",
    "longcat_flash": "some of its experts pass their input through",
    "nllb-moe": "it is an encoder-decoder model",
    "step3p7": "its experts do not use the common interface",
    "switch_transformers": "it is an encoder-decoder model",
}
_OTHER = "Choose a model of another family, such as Qwen3-MoE, Mixtral or DeepSeek."
_LOADING = threading.RLock()  # Replacing classes is process-wide: one load at a time.


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer: `index` counts MoE layers from 0, `name` is the experts module's name.

    `router(x, ...)` returns (logits, weights, indices, ...) and is None where it has no name.
    """

    index: int
    name: str
    module: nn.Module
    router: nn.Module | None
    experts: int
    top_k: int
    math: ExpertMath
    format: ExpertFormat


def is_experts(module: nn.Module) -> bool:
    """Say whether `module` takes its experts' computation from the experts interface."""
    return hasattr(module, "is_concatenated") and hasattr(module, "_is_expert_parallel")


def find_moe_layers(model: nn.Module, dtype: torch.dtype) -> list[MoeLayer]:
    """Describe every MoE layer in order; `dtype` is that of the expert weights.

    Works on a meta skeleton and on a model whose experts were stripped.
    """
    layers: list[MoeLayer] = []
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        parent = model.get_submodule(name.rpartition(".")[0])
        router = getattr(parent, "gate", None) or getattr(parent, "router", None)
        shapes = expert_shapes(module)
        type_name = str(dtype).removeprefix("torch.")
        if type_name not in DTYPE_BYTES:
            raise UnsupportedModelError(f"Experts in {type_name} cannot be run here.", _OTHER)
        first = next(iter(shapes.values()))
        layers.append(
            MoeLayer(
                index=len(layers),
                name=name,
                module=module,
                router=router,
                experts=first[0],
                top_k=_top_k(router, module, first[0]),
                math=expert_math(module),
                format=lay_out([(part, shape[1:], type_name) for part, shape in shapes.items()]),
            )
        )
    return layers


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape (experts, ...) of each weight of an experts module, stripped or not."""
    shapes: dict[str, tuple[int, ...]] | None = getattr(module, "stripped_shapes", None)
    if shapes is not None:
        return shapes
    weights = {part: getattr(module, part, None) for part in PARTS}
    return {part: tuple(p.shape) for part, p in weights.items() if isinstance(p, nn.Parameter)}


def expert_math(module: Any) -> ExpertMath:
    """Describe how the experts of `module` compute; keeps its activation and norm, no weights."""
    kind = type(module).__name__
    up, down = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    activate = module._apply_gate if module.has_gate else module.act_fn
    if module.has_gate and type(module)._apply_gate is _default_apply_gate:
        activate = _gated(module.act_fn)
    return ExpertMath(
        up=up,
        down=down,
        up_bias=f"{up}_bias" if module.has_bias else None,
        down_bias=f"{down}_bias" if module.has_bias else None,
        transposed=bool(module.is_transposed),
        activate=activate,
        normalize=module.post_expert_norm if module.has_post_expert_norm else None,
        in_float32=kind in _IN_FLOAT32,
        accumulate=_ACCUMULATE.get(kind, "hidden"),
    )


def attach(layers: Sequence[MoeLayer], run: Run) -> None:
    """Send every forward of these layers to `run`, from now on."""
    for layer in layers:
        module: Any = layer.module
        module.prescope_run = run
        module.prescope_layer = layer.index


def detach(layers: Sequence[MoeLayer]) -> None:
    """Undo `attach`, so that the model no longer holds on to what runs its experts."""
    for layer in layers:
        layer.module.__dict__.pop("prescope_run", None)


@contextmanager
def loading_lock() -> Iterator[None]:
    """Hold what only one load of this process may hold: building models changes global state."""
    with _LOADING:
        yield


@contextmanager
def stripped_experts(model: nn.Module) -> Iterator[None]:
    """Let models built inside have no expert weights where `model`, a skeleton, has them.

    Holds the process-wide loading lock. Undoes everything, whatever is raised inside.
    """
    classes = {type(module) for module in model.modules() if is_experts(module)}
    replacements = {kind.__name__: _without_weights(kind) for kind in classes}
    with _LOADING:
        register_patch_mapping(replacements, overwrite=True)
        try:
            yield
        finally:
            unregister_patch_mapping(list(replacements))
            # transformers leaves its patched names behind when building the model raises.
            _restore(classes, set(replacements.values()))


def refuse_foreign_family(family: str) -> None:
    """Refuse a model_type that is known not to use the experts interface.

    Raises:
        UnsupportedModelError: names the family and the reason.
    """
    reason = _NOT_OURS.get(family.removesuffix("_text"))
    if reason is not None:
        raise UnsupportedModelError(f"{family} models cannot be run: {reason}.", _OTHER)


def check_every_moe_layer_is_ours(model: nn.Module) -> None:
    """Refuse a model with experts that would not go through the experts interface.

    transformers accepts the choice of an implementation from families that ignore it.

    Raises:
        UnsupportedModelError: names the family and the reason.
    """
    config: Any = model.config
    family = str(config.model_type)
    refuse_foreign_family(family)
    found = False
    for name, module in model.named_modules():
        if is_experts(module):
            found = True
        elif _looks_like_experts(name, type(module).__name__):
            raise UnsupportedModelError(
                f"{family} models cannot be run: {name} ({type(module).__name__}) does not use"
                " the common experts interface.",
                _OTHER,
            )
    if not found:
        raise UnsupportedModelError(
            f"This {family} model has no routed experts.",
            "PreScope is for Mixture-of-Experts models; any other runs in a common chat program.",
        )


def _run_experts(module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    try:
        run: Run = module.prescope_run
    except AttributeError:
        raise RuntimeError("these experts have no weights of their own: call attach") from None
    return run(module.prescope_layer, hidden, index, weights)


ExpertsInterface.register(IMPLEMENTATION, _run_experts)


def _gated(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def activate(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return act(gate) * up

    return activate


def _top_k(router: nn.Module | None, experts: Any, count: int) -> int:
    text: Any = experts.config.get_text_config()
    for owner in (router, experts, experts.config, text):
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, int) and 1 <= value <= count:
                return value
    raise UnsupportedModelError(
        f"How many of the {count} experts a token of {experts.config.model_type} uses is not"
        " stated in its configuration.",
        _OTHER,
    )


_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "num_experts_per_token",
)


def _without_weights(kind: type[nn.Module]) -> type[nn.Module]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        self.stripped_shapes = expert_shapes(self)
        for part in self.stripped_shapes:
            del self._parameters[part]
        self._is_hf_initialized = True  # Initialisation would look for the missing weights.

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _restore(classes: Iterable[type], replacements: set[type[nn.Module]]) -> None:
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("transformers"):
            continue
        for kind in classes:
            if module.__dict__.get(kind.__name__) in replacements:
                setattr(module, kind.__name__, kind)


def _looks_like_experts(name: str, kind: str) -> bool:
    return name.rpartition(".")[2] == "experts" or (
        re.search(r"Expert", kind) is not None and "Shared" not in kind
    )
