"""From a stranger's config.json to a skeleton of the model, without weights and without trust.

Only keys that the pinned configuration class itself knows survive, and only numbers in range; the
file is never handed to a library.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from runtime.adapter import (
    IMPLEMENTATION,
    adapted_families,
    check_every_moe_layer_is_ours,
    refuse_foreign_family,
)
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.quantized_schemes import Quantisation, quantisation_from
from runtime.safetensors_files import read_json

CONFIG_NAME = "config.json"
MAX_CONFIG_BYTES = 4 * 2**20
DTYPES = ("float32", "bfloat16", "float16")
_OTHER = "Choose a Mixture-of-Experts model of a family that PreScope knows."
_AGAIN = "Download the model again, or choose another one."

# Keys that select code, files or plans; whatever a file says about these is dropped.
_NEVER = {
    "attn_implementation",
    "auto_map",
    "compression_config",
    "distributed_config",
    "experts_implementation",
    "extra_files",
    "fusion_config",
    "kernel_config",
    "name_or_path",
    "quantization_config",
    "transformers_weights",
    "trust_remote_code",
    "use_kernels",
    "use_mamba_kernels",
}
_QUANTISATION_KEYS = ("quantization_config", "compression_config")
_EXPERTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_TOP_K = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "num_experts_per_token")
_RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), (1, 512)),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size"), (1, 2**18)),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), (1, 4096)),
    **dict.fromkeys(_EXPERTS, (1, 2**14)),
    **dict.fromkeys(_TOP_K, (1, 2**10)),
    "head_dim": (0, 2**14),
    "vocab_size": (1, 2**22),
    "max_position_embeddings": (1, 2**28),
}
_MAX_NUMBER = 2**40
_MAX_MODULES = 2**13
_MAX_ITEMS = 2**18
_MAX_TEXT = 2**16
# What a library may raise over values that have the wrong type or do not fit each other.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def read_config(folder: Path, half: torch.dtype = torch.bfloat16) -> Any:
    """Return the model's configuration, rebuilt from the keys and values that are allowed.

    Of quantised weights that name float16 it says `half`. Float16 is what AWQ's and GPTQ's own
    kernels want; of the two, it is for whoever knows where the model will run.

    Raises:
        ModelFilesError: config.json is missing, unreadable or has a value out of range.
        UnsupportedModelError: the family or the weights' format cannot be run here.
    """
    raw = read_json(folder / CONFIG_NAME, MAX_CONFIG_BYTES)
    family = raw.get("model_type")
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        what = "states no family" if family is None else f"is of the unknown family {family!r:.80}"
        if "auto_map" in raw:
            what += " and wants to run its own code"
        raise UnsupportedModelError(f"This model {what} (model_type in config.json).", _OTHER)
    refuse_foreign_family(family)
    try:
        config = _build(CONFIG_MAPPING[family], raw, CONFIG_NAME)
    except REFUSALS as error:
        raise ModelFilesError(f"config.json cannot be used: {error!s:.300}", _AGAIN) from error
    if not any(type(config) in auto._model_mapping for auto in _AUTO_CLASSES):
        raise UnsupportedModelError(f"{family} models do not write text.", _OTHER)
    if _quantisation_records(raw) and stored_dtype(config) == torch.float16:
        config.dtype = half
    return config


def read_quantisation(folder: Path) -> Quantisation | None:
    """Return how the weights in `folder` are quantised, or None where they are not.

    Raises:
        ModelFilesError: config.json is missing or unreadable.
        UnsupportedModelError: they are quantised in a way that cannot be read.
    """
    found = _quantisation_records(read_json(folder / CONFIG_NAME, MAX_CONFIG_BYTES))
    if not found:
        return None
    if any(record != found[0] for record in found):
        raise UnsupportedModelError(
            "Weights that are quantised in several ways (more than one quantization_config)"
            " cannot be read.",
            _OTHER,
        )
    return quantisation_from(found[0])


def _quantisation_records(raw: dict[str, Any]) -> list[Any]:
    owners = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    return [owner[key] for key in _QUANTISATION_KEYS for owner in owners if owner.get(key)]


def stored_dtype(config: Any) -> torch.dtype | None:
    """Return the dtype that the configuration names, or None.

    Raises:
        UnsupportedModelError: it names one that cannot be run.
    """
    named = config.dtype or config.get_text_config().dtype
    if named is None:
        return None
    name = str(named).removeprefix("torch.")
    if name not in DTYPES:
        raise UnsupportedModelError(f"Weights of dtype {name[:40]} cannot be run.", _OTHER)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def build_skeleton(config: Any, dtype: torch.dtype) -> Any:
    """Return the model with all parameters on the meta device: shapes, but no memory.

    Raises:
        ModelFilesError: the configuration's values do not fit each other.
        UnsupportedModelError: the family's experts cannot be run here.
    """
    auto = next(auto for auto in _AUTO_CLASSES if type(config) in auto._model_mapping)
    try:
        _ = auto._model_mapping[type(config)]  # imports the modelling code that may be adapted
        with adapted_families(), _few_modules(), torch.device("meta"):
            model = auto.from_config(
                copy.deepcopy(config), dtype=dtype, experts_implementation=IMPLEMENTATION
            )
    except REFUSALS as error:
        raise ModelFilesError(
            f"No {config.model_type} model can be built from config.json: {error!s:.300}", _AGAIN
        ) from error
    check_every_moe_layer_is_ours(model)
    return model.eval()


@contextmanager
def _few_modules() -> Iterator[None]:
    """Stop building a model without end: some families loop over counts that have no range here."""
    left = _MAX_MODULES

    def count(module: nn.Module, name: str, inside: nn.Module | None) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ModelFilesError(
                f"config.json describes a model of more than {_MAX_MODULES} modules.", _AGAIN
            )

    counting = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        counting.remove()


_AUTO_CLASSES: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForImageTextToText)


def _build(kind: Any, raw: dict[str, Any], where: str) -> Any:
    known = _known_keys(kind)
    clean = {}
    for key, value in raw.items():
        if key in _NEVER or key.startswith("_") or key not in known:
            continue
        sub = kind.sub_configs.get(key)
        if sub is not None and isinstance(value, dict):
            if sub is AutoConfig:
                family = value.get("model_type")
                if not isinstance(family, str) or family not in CONFIG_MAPPING:
                    raise UnsupportedModelError(
                        f"{where}: {key} is of the unknown family {family!r:.80}.", _OTHER
                    )
                sub = CONFIG_MAPPING[family]
            clean[key] = _build(sub, value, f"{where}: {key}")
        else:
            value = _floats(value)
            _check_value(f"{where}: {key}", key, value)
            clean[key] = value
    if "dtype" not in clean and isinstance(raw.get("torch_dtype"), str):
        clean["dtype"] = raw["torch_dtype"]
    _check_top_k(where, clean)
    return kind(**clean)


def _floats(value: Any) -> Any:
    """Undo transformers' spelling of infinity, which plain JSON has no word for."""
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return {"Infinity": math.inf, "-Infinity": -math.inf}.get(value["__float__"], math.nan)
    return value


def _known_keys(kind: Any) -> set[str]:
    """Return the keys a configuration class declares or, for older files, looks for by name."""
    names = kind.attribute_map
    known = set(kind.sub_configs) | set(names) | set(names.values())
    for owner in kind.__mro__:
        known |= set(getattr(owner, "__annotations__", {}))
        for function in vars(owner).values():
            if inspect.isfunction(function):
                known |= set(_texts_in(function.__code__))
                known |= set(inspect.signature(function).parameters)
    return known


def _texts_in(code: CodeType) -> Iterator[str]:
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _texts_in(constant)


def _check_value(where: str, key: str, value: Any) -> None:
    """Refuse numbers out of range, alone or in lists and objects."""
    if isinstance(value, dict):
        items: list[Any] = list(value.values())
    else:
        items = value if isinstance(value, list) else [value]
    if len(items) > _MAX_ITEMS:
        raise ModelFilesError(f"{where} has {len(items)} items, which is absurd.", _AGAIN)
    low, high = _RANGES.get(key, (-_MAX_NUMBER, _MAX_NUMBER))
    for item in items:
        if isinstance(item, (dict, list)):
            _check_value(where, "", item)
        elif isinstance(item, str):
            if key in _RANGES or len(item) > _MAX_TEXT:
                raise ModelFilesError(f"{where} = {item[:40]!r} is not a number in range.", _AGAIN)
        elif isinstance(item, bool) or item is None:
            continue
        elif isinstance(item, float) and key not in _RANGES:
            if math.isnan(item):
                raise ModelFilesError(f"{where} = {item} is not a number.", _AGAIN)
        elif not low <= item <= high or isinstance(item, float):
            raise ModelFilesError(f"{where} = {item} is not between {low} and {high}.", _AGAIN)


def _check_top_k(where: str, clean: dict[str, Any]) -> None:
    counts = [clean[key] for key in _EXPERTS if isinstance(clean.get(key), int)]
    for key in _TOP_K:
        if counts and isinstance(clean.get(key), int) and clean[key] > max(counts):
            raise ModelFilesError(
                f"{where}: {key} = {clean[key]} is more than the {max(counts)} experts.", _AGAIN
            )
