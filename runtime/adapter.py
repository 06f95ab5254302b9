"""The one seam into transformers' models: its experts interface, registered once as "prescope".

An experts module keeps its flags, activation and norm, but not its weights: `stripped_experts`
makes `from_pretrained` build modules without them, `find_moe_layers` describes what is left, and
`attach` sends every call to one function.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping

from runtime.adapter_exceptions import original_of, stand_ins
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
    "deepseek_ocr2": "it transcribes pictures and does not chat",
    "diffusion_gemma": "it writes by diffusion and not token after token",
    "doge": "its experts are rows of an embedding",
    "inkling_mm_model": "building its vision tower needs the package scipy",
    "jetmoe": "its attention is made of experts too",
    "nllb-moe": "it is an encoder-decoder model",
    "openai_privacy_filter": "it labels words and writes no text",
    "qwen3_omni_moe": "it is several models in one; only its thinker can be run, alone",
    "switch_transformers": "it is an encoder-decoder model",
    "unlimited_ocr": "it transcribes pictures and does not chat",
    "vitpose_backbone": "it finds poses in pictures and writes no text",
}
_OTHER = "Choose a model of another family, such as Qwen3-MoE, Mixtral or DeepSeek."
_LOADING = threading.RLock()  # Replacing classes is process-wide: one load at a time.


@dataclass(frozen=True)
class MoeLayer:
    """One MoE layer: `index` counts MoE layers from 0, `name` is the experts module's name.

    `router(x, ...)` returns (logits, weights, indices, ...) and is None where it has no name.
    `idle_experts` are numbered after the `experts`, have no weights and are never run here.
    """

    index: int
    name: str
    module: nn.Module
    router: nn.Module | None
    experts: int
    top_k: int
    math: ExpertMath
    format: ExpertFormat
    idle_experts: int = 0


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
                idle_experts=getattr(module, "zero_expert_num", 0),
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
        normalize=_anywhere(module.post_expert_norm) if module.has_post_expert_norm else None,
        in_float32=kind in _IN_FLOAT32,
        accumulate=_ACCUMULATE.get(kind, "hidden"),
    )


def _anywhere(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """Let a norm whose weights are on the card be applied to what the CPU computed as well.

    They are copied once: a copy waits for all that the card was given before it.
    """
    copies: dict[torch.device, dict[str, Tensor]] = {}

    def normalize(x: Tensor) -> Tensor:
        if any(weight.device != x.device for weight in norm.parameters()):
            if x.device not in copies:
                weights = norm.named_parameters()
                copies[x.device] = {name: weight.to(x.device) for name, weight in weights}
            moved: Tensor = torch.func.functional_call(norm, copies[x.device], (x,))
            return moved
        made: Tensor = norm(x)
        return made

    return normalize


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
def adapted_families() -> Iterator[None]:
    """Let models built inside go through the experts interface even if their family does not.

    Only families whose modelling code is imported already. Holds the process-wide loading lock
    and undoes everything, whatever is raised inside.
    """
    with _replaced(stand_ins()):
        yield


@contextmanager
def stripped_experts(model: nn.Module) -> Iterator[None]:
    """Let models built inside have no expert weights where `model`, a skeleton, has them.

    Holds the process-wide loading lock. Undoes everything, whatever is raised inside.
    """
    replacements = stand_ins()
    for kind in {type(module) for module in model.modules() if is_experts(module)}:
        replacements[original_of(kind)] = _without_weights(kind)
    with _replaced(replacements):
        yield


@contextmanager
def _replaced(replacements: Mapping[type[nn.Module], type[nn.Module]]) -> Iterator[None]:
    by_name = {original.__name__: kind for original, kind in replacements.items()}
    with _LOADING:
        register_patch_mapping(by_name, overwrite=True)
        try:
            yield
        finally:
            unregister_patch_mapping(list(by_name))
            # transformers leaves its patched names behind when building the model raises.
            _restore(replacements, set(by_name.values()))


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
    for name, module in model.named_modules():
        if _routes_elsewhere(module):
            raise UnsupportedModelError(
                f"{family} models cannot be run: what {name} ({type(module).__name__}) routes to"
                " does not use the common experts interface.",
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
        for part, shape in self.stripped_shapes.items():
            del self._parameters[part]
            # The block around them may still want to initialise them: here is what takes no room.
            stub: Any = torch.empty(shape, device="meta")
            stub._is_hf_initialized = True
            self.__dict__[part] = stub
        self._is_hf_initialized = True  # Initialisation would look for the missing weights.

    return type(kind.__name__, (kind,), {"__init__": __init__, "__module__": kind.__module__})


def _restore(classes: Iterable[type], replacements: set[type[nn.Module]]) -> None:
    for module in list(sys.modules.values()):
        if not getattr(module, "__name__", "").startswith("transformers"):
            continue
        for kind in classes:
            if module.__dict__.get(kind.__name__) in replacements:
                setattr(module, kind.__name__, kind)


def _routes_elsewhere(module: nn.Module) -> bool:
    """Say whether a block has a router, which knows its `top_k`, but no experts of ours."""
    routers = (getattr(module, name, None) for name in ("gate", "router"))
    if not any(isinstance(r, nn.Module) and hasattr(r, "top_k") for r in routers):
        return False
    return not any(is_experts(inside) for inside in module.modules())


def _looks_like_experts(name: str, kind: str) -> bool:
    return name.rpartition(".")[2] == "experts" or (
        re.search(r"Expert", kind) is not None and "Shared" not in kind
    )
