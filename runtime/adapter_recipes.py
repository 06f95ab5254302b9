"""From checkpoint keys to recipes: which bytes of which tensors make up which expert.

transformers describes per family how checkpoint tensors become parameters; here that description
is read, not run, wherever it only merges, so that experts go from the file to their slab.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ErnieFuseAndSplitTextVisionExperts,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from runtime.adapter import MoeLayer
from runtime.adapter_quantized import quantised_part
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.formats import Matrix, Part, lay_out
from runtime.quantized_tensors import TensorTable
from runtime.safetensors_files import TensorEntry
from runtime.store_recipes import Conversion, LayerSource, Piece, Recipe
from runtime.weight_forms import parts_of

_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
_AGAIN = "Download the model again, or choose another one."


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint, sorted into experts and what the model loads itself."""

    sources: tuple[LayerSource, ...]
    dense: tuple[str, ...]
    tensors: TensorTable


@dataclass
class _Found:
    """The tensors that make up one parameter, by source pattern, in the order of experts."""

    converter: Any = None
    tensors: dict[str | None, list[str]] = field(default_factory=dict)


def sort_checkpoint(
    skeleton: nn.Module, layers: Sequence[MoeLayer], tensors: TensorTable
) -> Checkpoint:
    """Find every expert of `layers` among `tensors`; `skeleton` still has its expert parameters.

    The sources have the formats in which experts will be held: that of `layers`, except for what
    is quantised in the files.

    Raises:
        ModelFilesError: an expert's tensor is missing or has the wrong shape.
        UnsupportedModelError: an expert's tensor has a dtype that cannot be loaded.
    """
    wanted = {f"{layer.name}.{part.name}" for layer in layers for part in layer.format.parts}
    found, dense = _sort_keys(skeleton, wanted, tensors)
    for parameter in wanted - found.keys():
        raise ModelFilesError(f"The files have no tensors for {parameter}.", _AGAIN)
    plain = {name: entry for name, entry in tensors.items() if isinstance(entry, TensorEntry)}
    sources = []
    for layer in layers:
        columns: list[list[Recipe]] = []
        held: list[tuple[str, tuple[int, ...], str]] = []
        matrices: list[Matrix] = []
        for part in layer.format.parts:
            name = f"{layer.name}.{part.name}"
            source = found[name]
            keys = {key for listed in source.tensors.values() for key in listed}
            if keys <= plain.keys():
                steps = _part_steps(source, layer, part, plain, skeleton)
                held.append((part.name, part.shape, part.dtype))
            else:
                lists = _quantised_lists(source, layer, name)
                below = [[tensors[key] for key in listed] for listed in lists]
                matrix, steps = quantised_part(below, layer, part)
                matrices.append(matrix)
                held += parts_of(matrix)
            columns.append(steps)
        recipes = tuple(
            tuple(step for column in columns for step in column[expert])
            for expert in range(layer.experts)
        )
        sources.append(LayerSource(lay_out(held, matrices), recipes))
    return Checkpoint(tuple(sources), tuple(dense), tensors)


def _sort_keys(
    skeleton: Any, wanted: set[str], tensors: TensorTable
) -> tuple[dict[str, _Found], list[str]]:
    state = skeleton.state_dict()
    mapping = get_model_conversion_mapping(skeleton)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = skeleton.base_model_prefix
    found: dict[str, _Found] = {}
    dense = []
    renamed: dict[str, tuple[str, str | None]] = {}
    for key in sorted(tensors, key=dot_natural_key):
        # Renaming takes 0.2 ms, and all experts of a layer get the same name.
        sibling = _EXPERT_NUMBER.sub(".experts.*.", key)
        name, pattern = renamed.get(sibling, ("", None))
        if name not in wanted:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        renamed[sibling] = (name, pattern)
        if name in wanted:
            converter = by_pattern[pattern] if pattern is not None else None
            source = found.setdefault(name, _Found(converter))
            source.tensors.setdefault(pattern, []).append(key)
        elif name in state:
            dense.append(key)
    _split_siblings(found)
    return found, dense


def _split_siblings(found: dict[str, _Found]) -> None:
    # One list of experts may feed several modules in equal shares (Ernie's text and vision); its
    # renamed key names only the first of them.
    for name, source in list(found.items()):
        converter = source.converter
        if converter is None or len(converter.target_patterns) == 1:
            continue
        if not isinstance(converter.operations[0], ErnieFuseAndSplitTextVisionExperts):
            continue
        shares = len(converter.target_patterns)
        for number, target in enumerate(converter.target_patterns):
            part = {
                pattern: keys[number * len(keys) // shares : (number + 1) * len(keys) // shares]
                for pattern, keys in source.tensors.items()
            }
            found[name.replace(converter.target_patterns[0], target)] = _Found(converter, part)


def _part_steps(
    source: _Found,
    layer: MoeLayer,
    part: Part,
    tensors: Mapping[str, TensorEntry],
    skeleton: nn.Module,
) -> list[Recipe]:
    """Return, for each expert of the layer, the steps that fill `part`."""
    for keys in source.tensors.values():
        for key in keys:
            if tensors[key].dtype is None:
                raise UnsupportedModelError(
                    f"Tensor {key} is stored as {tensors[key].stored}, which cannot be run yet.",
                    "Choose a version of this model in bfloat16, float16 or float32.",
                )
    if source.converter is None:
        return _slices(source, layer, part, tensors)
    lists = _merged_lists(source, layer, f"{layer.name}.{part.name}")
    if lists is not None:
        return _merges(lists, layer, part, tensors)
    return _conversions(source, layer, part, tensors, skeleton)


def _merged_lists(source: _Found, layer: MoeLayer, name: str) -> list[list[str]] | None:
    """Return the tensors that lie below each other, by expert, where the family only merges."""
    operations = [type(operation) for operation in source.converter.operations]
    ernie = ErnieFuseAndSplitTextVisionExperts in operations
    if not (ernie or MergeModulelist in operations):
        return None
    lists = [source.tensors.get(p, []) for p in source.converter.source_patterns]
    for keys in lists:
        # Files may hold rows for experts that compute nothing; nobody reads them.
        if keys and len(keys) not in (layer.experts, layer.experts + layer.idle_experts):
            _wrong(name, f"{len(keys)} experts in the files instead of {layer.experts}")
    merged = source.converter.operations[-1] if len(operations) == 2 else None
    rows_first = isinstance(merged, Concatenate) and merged.dim == 1
    if ernie or operations == [MergeModulelist] or rows_first:
        return [keys for keys in lists if keys]
    return None


def _quantised_lists(source: _Found, layer: MoeLayer, name: str) -> list[list[str]]:
    if source.converter is None:
        return list(source.tensors.values())
    lists = _merged_lists(source, layer, name)
    if lists is None:
        raise UnsupportedModelError(
            f"{name} is quantised in the files and laid out in a way that cannot be read.",
            "Choose a version of this model in bfloat16, float16 or float32.",
        )
    return lists


def _slices(
    source: _Found, layer: MoeLayer, part: Part, tensors: Mapping[str, TensorEntry]
) -> list[Recipe]:
    ((key, *others),) = source.tensors.values()
    name = f"{layer.name}.{part.name}"
    shape = tensors[key].shape
    if others or shape != (layer.experts, *part.shape):
        _wrong(name, f"{key} has the shape {shape} instead of {(layer.experts, *part.shape)}")
    items = math.prod(part.shape)
    return [(Piece(part.name, key, e * items, items, 0),) for e in range(layer.experts)]


def _merges(
    lists: Sequence[Sequence[str]],
    layer: MoeLayer,
    part: Part,
    tensors: Mapping[str, TensorEntry],
) -> list[Recipe]:
    recipes: list[Recipe] = []
    for expert in range(layer.experts):
        steps = []
        into = 0
        for keys in lists:
            key = keys[expert]
            shape = tensors[key].shape
            items = math.prod(shape)
            if shape[1:] != part.shape[1:] or len(shape) != len(part.shape):
                _wrong(f"{layer.name}.{part.name}", f"{key} has the shape {shape}")
            steps.append(Piece(part.name, key, 0, items, into))
            into += items
        if into != math.prod(part.shape):
            _wrong(
                f"{layer.name}.{part.name}",
                f"expert {expert} has {into} items in the files instead of {part.shape}",
            )
        recipes.append(tuple(steps))
    return recipes


def _conversions(
    source: _Found,
    layer: MoeLayer,
    part: Part,
    tensors: Mapping[str, TensorEntry],
    skeleton: nn.Module,
) -> list[Recipe]:
    per_expert = any(isinstance(op, MergeModulelist) for op in source.converter.operations)
    recipes: list[Recipe] = []
    for expert in range(layer.experts):
        names: list[str | None] = []
        inputs: list[tuple[str, int | None]] = []
        for pattern, keys in source.tensors.items():
            if not per_expert and (
                len(keys) != 1 or tensors[keys[0]].shape[:1] != (layer.experts,)
            ):
                _wrong(f"{layer.name}.{part.name}", f"{keys[0]} is not one row per expert")
            names.append(pattern)
            inputs.append((keys[expert], None) if per_expert else (keys[0], expert))
        convert = _converting(source.converter, names, layer, part, skeleton)
        recipes.append((Conversion(part.name, tuple(inputs), convert),))
    return recipes


def _converting(
    converter: Any, names: Sequence[str | None], layer: MoeLayer, part: Part, skeleton: Any
) -> Callable[[Sequence[Tensor]], Tensor]:
    """Run the family's own operations on a single expert."""
    parameter = f"{layer.name}.{part.name}"

    def convert(inputs: Sequence[Tensor]) -> Tensor:
        columns: Any = {name: [tensor] for name, tensor in zip(names, inputs, strict=True)}
        for operation in converter.operations:
            columns = operation.convert(
                columns,
                source_patterns=converter.source_patterns,
                target_patterns=converter.target_patterns,
                full_layer_name=parameter,
                model=_OneExpert(part),
                config=skeleton.config,
                missing_keys=None,
            )
        (result,) = columns.values()
        tensor: Tensor = (result[0] if isinstance(result, list) else result)[0]
        if tuple(tensor.shape) != part.shape:
            _wrong(parameter, f"an expert has the shape {tuple(tensor.shape)}, not {part.shape}")
        return tensor

    return convert


@dataclass(frozen=True)
class _OneExpert:
    """Stands in for the model where an operation asks for a parameter's shape."""

    part: Part

    def get_parameter(self, name: str) -> Tensor:
        dtype: torch.dtype = getattr(torch, self.part.dtype)
        return torch.empty((1, *self.part.shape), dtype=dtype, device="meta")


def _wrong(parameter: str, what: str) -> NoReturn:
    raise ModelFilesError(f"The files do not fit {parameter}: {what}.", _AGAIN)
