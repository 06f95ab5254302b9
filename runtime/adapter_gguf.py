"""From the tensors of a GGUF model to its parameters: names, arrangements, and recipes of experts.

Every tensor has to find a place in the model, so that a file with parts that this code does not
know is refused and not run without them. Experts stay quantised as they are in the file; dense
weights are dequantised when transformers' loader asks for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from runtime.adapter import MoeLayer
from runtime.adapter_gguf_mapped import mapping_of
from runtime.adapter_gguf_weights import GgufWeight, row_numbers
from runtime.adapter_recipes import Checkpoint
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.formats import Form, Matrix, Part, lay_out
from runtime.gguf_blocks import FORMS, common_form, pieces, stacked, widened
from runtime.gguf_files import GgufFiles, logical_shape
from runtime.safetensors_files import TensorEntry
from runtime.store_recipes import Conversion, Encoding, LayerSource, Piece, Recipe
from runtime.weight_forms import PIECE_ROWS, Codes, form_for, parts_of

_AGAIN = "Download the model again, or choose another one."
_OTHER = "Choose a version of this model as safetensors."
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_EXPERTS = re.compile(r"ffn_(gate|up|down|gate_up)_exps")
_ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Where a layer's tensors may belong in it; families differ, and the model says which place it has.
_PLACES: dict[str, tuple[str, ...]] = {
    "attn_k": ("self_attn.k_proj",),
    "attn_k_norm": ("self_attn.k_norm",),
    "attn_kv_a_mqa": ("self_attn.kv_a_proj_with_mqa",),
    "attn_kv_a_norm": ("self_attn.kv_a_layernorm",),
    "attn_kv_b": ("self_attn.kv_b_proj",),
    "attn_norm": ("input_layernorm",),
    "attn_output": ("self_attn.o_proj",),
    "attn_q": ("self_attn.q_proj",),
    "attn_q_a": ("self_attn.q_a_proj",),
    "attn_q_a_norm": ("self_attn.q_a_layernorm",),
    "attn_q_b": ("self_attn.q_b_proj",),
    "attn_q_norm": ("self_attn.q_norm",),
    "attn_sinks": ("self_attn.sinks",),
    "attn_v": ("self_attn.v_proj",),
    "exp_probs_b": ("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),
    "ffn_down": ("mlp.down_proj",),
    "ffn_down_shexp": ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_gate_inp": ("mlp.gate", "mlp.router"),
    "ffn_gate_inp_shexp": ("mlp.shared_expert_gate",),
    "ffn_gate_shexp": ("mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn_up": ("mlp.up_proj",),
    "ffn_up_shexp": ("mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj"),
    "post_attention_norm": ("post_attention_layernorm",),
}


def sort_gguf(files: GgufFiles, skeleton: nn.Module, layers: Sequence[MoeLayer]) -> Checkpoint:
    """Find every expert and dense weight of `skeleton`, which still has its expert parameters.

    Raises:
        ModelFilesError: an expert's tensor is missing, or a shape does not fit.
        UnsupportedModelError: a tensor has no place in the model.
    """
    sources = tuple(_layer_source(layer, files.tensors) for layer in layers)
    dense = _dense(files.metadata["general.architecture"], skeleton, files.tensors)
    return Checkpoint(sources, tuple(dense), dense)


def _dense(architecture: str, skeleton: Any, tensors: Mapping[str, TensorEntry]) -> dict[str, Any]:
    state = {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
    config = skeleton.config.get_text_config()
    mapping = mapping_of(architecture, skeleton)
    found: dict[str, GgufWeight] = {}
    for name, entry in tensors.items():
        block = _BLOCK.fullmatch(name)
        # Blocks after the last layer only guess further tokens.
        if block and (int(block[1]) >= config.num_hidden_layers or _EXPERTS.fullmatch(block[2])):
            continue
        if block and block[2] == "attn_v_b":
            continue  # Taken together with attn_k_b.
        places = _places(name, block) if mapping is None else [mapping.place(name)]
        place = next((place for place in places if place in state), None)
        if place is None:
            raise UnsupportedModelError(
                f"Tensor {name} has no place in a {config.model_type} model.", _OTHER
            )
        if place in found:
            other = found[place].sources[0].name
            raise ModelFilesError(f"{name} and {other} are both {place}.", _AGAIN)
        if mapping is not None:
            arrange = partial(mapping.arranged, name, state[place])
            found[place] = GgufWeight(place, state[place], (entry,), arrange)
        elif block and block[2] == "attn_k_b":
            values = _needed(f"blk.{block[1]}.attn_v_b.weight", tensors)
            found[place] = GgufWeight(place, state[place], (entry, values), _keys_and_values)
        else:
            arrange = partial(_arranged, name, state[place], _turned(block, config))
            found[place] = GgufWeight(place, state[place], (entry,), arrange)
        _check_items(found[place])
    return found


def _places(name: str, block: re.Match[str] | None) -> list[str]:
    """Return the parameters that a tensor may be, most likely first."""
    if block is None:
        stem, _, kind = name.rpartition(".")
        return [f"{_ENDS[stem]}.{kind}"] if stem in _ENDS else []
    leaf = "attn_kv_b" if block[2] == "attn_k_b" else block[2]
    at = [f"model.layers.{block[1]}.{place}" for place in _PLACES.get(leaf, ())]
    return [f"{place}.{block[3]}" for place in at] + at


def _turned(block: re.Match[str] | None, config: Any) -> int:
    """Return the heads whose rows llama.cpp turned to its order of rotary pairs, or 0."""
    if config.model_type != "mixtral" or block is None:
        return 0
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    return int(heads.get(block[2], 0))


def _arranged(name: str, shape: tuple[int, ...], heads: int, numbers: Sequence[Tensor]) -> Tensor:
    (tensor,) = numbers
    if heads:
        if len(tensor) % (2 * heads):
            _wrong(name, f"{len(tensor)} rows are no pairs for {heads} heads")
        pairs = tensor.reshape(heads, len(tensor) // heads // 2, 2, *tensor.shape[1:])
        tensor = pairs.transpose(1, 2)
    return tensor.reshape(shape)


def _keys_and_values(numbers: Sequence[Tensor]) -> Tensor:
    """Put back together what llama.cpp keeps as attn_k_b (heads, rank, keys) and attn_v_b.

    attn_v_b is (heads, values, rank); the result has each head's keys and then its values.
    """
    keys, values = numbers
    return torch.cat((keys.transpose(1, 2), values), 1).flatten(0, 1)


def _check_items(weight: GgufWeight) -> None:
    shapes = [logical_shape(source) for source in weight.sources]
    if len(shapes) == 1:
        # An axis of one is kept or left out as a converter pleases.
        fits = [n for n in shapes[0] if n > 1] == [n for n in weight.shape if n > 1]
    else:
        keys, values = shapes
        fits = len(keys) == len(values) == 3 and keys[0] == values[0] and keys[1] == values[2]
        fits = fits and (keys[0] * (keys[2] + values[1]), keys[1]) == weight.shape
    if not fits:
        _wrong(weight.name, f"{weight.sources[0].name} has the shape {shapes[0]}")


def _layer_source(layer: MoeLayer, tensors: Mapping[str, TensorEntry]) -> LayerSource:
    held: list[tuple[str, tuple[int, ...], str]] = []
    matrices: list[Matrix] = []
    columns: list[list[Recipe]] = []
    for part in layer.format.parts:
        entries = _entries(layer, part, tensors)
        if all(entry.stored in FORMS for entry in entries) and len(part.shape) == 2:
            matrix, steps = _quantised(layer, part, entries)
            matrices.append(matrix)
            held += parts_of(matrix)
        else:
            steps = _plain(layer, part, entries)
            held.append((part.name, part.shape, part.dtype))
        columns.append(steps)
    recipes = tuple(
        tuple(step for column in columns for step in column[expert])
        for expert in range(layer.experts)
    )
    return LayerSource(lay_out(held, matrices), recipes)


def _entries(layer: MoeLayer, part: Part, tensors: Mapping[str, TensorEntry]) -> list[TensorEntry]:
    """Return the tensors whose rows make up `part`, gate before up, shapes checked."""
    name = f"{layer.name}.{part.name}"
    number = _LAYER.search(layer.name)
    base = part.name.removesuffix("_bias")
    kind = "weight" if base == part.name else "bias"
    if number is None or base not in ("gate_up_proj", "down_proj"):
        raise UnsupportedModelError(f"{name} cannot be read from GGUF yet.", _OTHER)
    leaves = ["down"] if base == "down_proj" else ["gate", "up"]
    if base != "down_proj" and f"blk.{number[1]}.ffn_gate_up_exps.{kind}" in tensors:
        leaves = ["gate_up"]
    if leaves == ["gate_up"] and not _concatenated(layer):
        raise UnsupportedModelError(f"{name} in one tensor cannot be read from GGUF yet.", _OTHER)
    entries = [_needed(f"blk.{number[1]}.ffn_{leaf}_exps.{kind}", tensors) for leaf in leaves]
    rows, *inputs = part.shape[::-1] if layer.math.transposed else part.shape
    wanted = (layer.experts, rows // len(entries), *inputs)
    for entry in entries:
        if logical_shape(entry) != wanted:
            _wrong(name, f"{entry.name} has the shape {logical_shape(entry)} instead of {wanted}")
    return entries


def _quantised(
    layer: MoeLayer, part: Part, entries: Sequence[TensorEntry]
) -> tuple[Matrix, list[Recipe]]:
    dtype: torch.dtype = getattr(torch, part.dtype)
    form = form_for(common_form([entry.stored for entry in entries]), dtype)
    outputs, inputs = part.shape[::-1] if layer.math.transposed else part.shape
    matrix = Matrix(part.name, (outputs, inputs), form)
    apart = _concatenated(layer) and outputs // len(entries) % PIECE_ROWS == 0
    steps: list[Recipe] = []
    together = [[entry] for entry in entries] if apart else [entries]
    unpacks = [partial(_codes, layer, form, inputs, tuple(e.stored for e in es)) for es in together]
    for expert in range(layer.experts):
        recipe = []
        first = 0
        for some, unpack in zip(together, unpacks, strict=True):
            sizes = [entry.size_bytes // layer.experts for entry in some]
            reads = [(e.name, expert * size, size) for e, size in zip(some, sizes, strict=True)]
            recipe.append(Encoding(matrix, tuple(reads), unpack, first))
            first += outputs // len(together)
        steps.append(tuple(recipe))
    return matrix, steps


def _codes(
    layer: MoeLayer,
    form: Form,
    inputs: int,
    kinds: Sequence[str],
    raw: Sequence[NDArray[np.uint8]],
) -> Iterator[Codes]:
    """Unpack what one expert has of tensors of these types, below each other or in turns."""
    spread = len(kinds) > 1 or any(FORMS[kind].kind != form.kind for kind in kinds)
    each = [
        (widened(codes, form) for codes in pieces(kind, data, inputs, spread))
        for kind, data in zip(kinds, raw, strict=True)
    ]
    if len(each) == 1:
        yield from each[0]
    elif _concatenated(layer):
        yield stacked([codes for matrix in each for codes in matrix], interleaved=False)
    else:
        for rows in zip(*each, strict=True):
            yield stacked(rows, interleaved=True)


def _plain(layer: MoeLayer, part: Part, entries: Sequence[TensorEntry]) -> list[Recipe]:
    transposed = layer.math.transposed and len(part.shape) == 2
    apart = len(entries) == 1 or _concatenated(layer)
    if apart and not transposed and not any(entry.stored in FORMS for entry in entries):
        items = math.prod(part.shape) // len(entries)
        return [
            tuple(
                Piece(part.name, entry.name, expert * items, items, number * items)
                for number, entry in enumerate(entries)
            )
            for expert in range(layer.experts)
        ]
    dtype: torch.dtype = getattr(torch, part.dtype)

    def convert(rows: Sequence[Tensor]) -> Tensor:
        pairs = zip(entries, rows, strict=True)
        each = [row_numbers(entry, row, dtype) for entry, row in pairs]
        joined = torch.cat(each) if apart else torch.stack(each, 1).flatten(0, 1)
        return joined.t() if transposed else joined

    names = [entry.name for entry in entries]
    return [
        (Conversion(part.name, tuple((name, expert) for name in names), convert),)
        for expert in range(layer.experts)
    ]


def _concatenated(layer: MoeLayer) -> bool:
    module: Any = layer.module
    return bool(module.is_concatenated)


def _needed(name: str, tensors: Mapping[str, TensorEntry]) -> TensorEntry:
    entry = tensors.get(name)
    if entry is None:
        raise ModelFilesError(f"The files lack the tensor {name}.", _AGAIN)
    return entry


def _wrong(parameter: str, what: str) -> NoReturn:
    raise ModelFilesError(f"The files do not fit {parameter}: {what}.", _AGAIN)
