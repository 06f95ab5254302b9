"""Quantised checkpoints run as the same model with plain weights does, in each file format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from runtime import store_recipes, weight_forms
from runtime.adapter import find_moe_layers
from runtime.adapter_config import build_skeleton, read_config, read_quantisation
from runtime.adapter_recipes import sort_checkpoint
from runtime.assembly import half_for
from runtime.core import ExpertId
from runtime.errors import ModelError, ModelFilesError, UnsupportedModelError
from runtime.kernels import views
from runtime.loader import LoadedModel, read_shape
from runtime.loader_shape import foresee_shape
from runtime.quantized_folding import fold
from runtime.quantized_schemes import quantisation_from
from runtime.quantized_tensors import QuantisedTensor
from runtime.safetensors_files import SafetensorsFiles, TensorEntry
from runtime.store_recipes import RecipeSource, bytes_in, reading_bytes
from runtime.weight_forms import dequantise, held, is_packed
from tests.checkpoints import attach_plain_runner, load, load_reference, logits
from tests.families import make_checkpoint
from tests.family_table import note
from tests.machines import emulated_profile
from tests.quantized_files import (
    FILE_FORMATS,
    FLOAT,
    PACKED_FORMATS,
    compressed,
    fp8_rows,
    pack_quantized,
    write_quantised,
)

KINDS = {"fp8": "fp8", "int8": "int8", "int4": "int4", "awq": "int4", "gptq": "int4"} | {
    "gptq, 8 bits": "int8",
    "mxfp4": "mxfp4",
    "fp8 with fp4": "mxfp4",
    "int8 groups, packed": "int8",
}


def expert_weights(loaded: LoadedModel, layer: int, expert: int) -> dict[str, Tensor]:
    """Return the plain weights that the store's bytes of an expert stand for."""
    layout = loaded.layers[layer].format
    parts = views(loaded.store.bytes_of(ExpertId(layer, expert)), layout)
    dtype = next(loaded.model.parameters()).dtype
    plain = {name: dequantise(held(m, parts), dtype) for m in layout.matrices for name in [m.name]}
    quantised = tuple(f"{matrix.name}." for matrix in layout.matrices)
    for name, part in parts.items():
        if name not in plain and not name.startswith(quantised):
            plain[name] = part
    return plain


def compare_experts(loaded: LoadedModel, stock: Any, bound: float = 0.0) -> None:
    """Assert that every expert's weights are those of a model that holds them plain.

    `bound` is the largest difference, as a share of a matrix's largest weight.
    """
    transposed = loaded.layers[0].math.transposed
    for layer in loaded.layers:
        module = stock.get_submodule(layer.name)
        for expert in range(layer.experts):
            weights = expert_weights(loaded, layer.index, expert)
            quantised = {matrix.name for matrix in layer.format.matrices}
            for part, weight in weights.items():
                theirs = getattr(module, part)[expert]
                theirs = theirs.t() if transposed and part in quantised else theirs
                difference = (weight.double() - theirs.double()).abs().max()
                assert difference <= bound * theirs.double().abs().max(), (expert, part)


WHOLE_MODELS = (
    "fp8 blocks",
    "fp8 blocks, deepseek",
    "fp8 blocks, fused",
    "fp8 with fp4",
    "fp8 rows",
    "fp8 tensors",
    "int4 groups",
    "int4 groups, zeros",
    "awq",
    "gptq",
    "mxfp4",
)


@pytest.mark.parametrize("name", [name for name in FILE_FORMATS if name != "mxfp4"])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (8, 80), (328, 16)])
def test_a_matrix_means_what_its_format_says(
    name: str, outputs: int, inputs: int, tmp_path: Path
) -> None:
    file_format = FILE_FORMATS[name]
    if "fp4" in name:
        inputs = -(-inputs // 32) * 32
    packed, meaning = file_format.pack(torch.Generator().manual_seed(5), outputs, inputs)
    tensors = {f"a.b.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors | {"a.c.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    table = fold(files.tensors, quantisation_from(file_format.config))
    assert (
        {"a.b.weight", "a.c.weight"}
        <= table.keys()
        <= {
            "a.b.weight",
            "a.c.weight",
            "a.b.weight_shape",
            "a.b.input_scale",
        }
    )
    tensor = table["a.b.weight"]
    assert isinstance(tensor, QuantisedTensor)
    assert tensor.shape == (outputs, inputs)
    raw = []
    for source, first, size in tensor.inputs():
        raw.append(np.empty(size, np.uint8))
        files.read([(source, first, bytes_in(raw[-1]))])
    files.close()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(tensor.dequantised(raw, dtype), meaning.to(dtype))


def test_layers_of_one_file_may_follow_different_schemes(tmp_path: Path) -> None:
    schemes = {
        "attention.weight": (compressed("", strategy="channel", **FLOAT), fp8_rows),
        "experts.weight": (compressed("", group_size=16), pack_quantized(16)),
        "shared.weight": (compressed("", group_size=8), pack_quantized(8)),
        "head.weight": (
            compressed("", group_size=16, num_bits=8, symmetric=False),
            pack_quantized(16, zeros=True, bits=8),
        ),
    }
    tensors, meant = {}, {}
    config = compressed("mixed-precision", group_size=16)
    for number, (name, (scheme, pack)) in enumerate(schemes.items()):
        packed, meant[name] = pack(torch.Generator().manual_seed(number), 24, 64)
        stem = name.removesuffix("weight")
        tensors |= {stem + suffix: tensor for suffix, tensor in packed.items()}
        config["config_groups"][f"group_{number}"] = scheme["config_groups"]["group_0"]
    save_file(tensors, tmp_path / "model.safetensors")
    files = SafetensorsFiles(tmp_path)
    table = fold(files.tensors, quantisation_from(config))
    for name, meaning in meant.items():
        tensor = table[name]
        assert isinstance(tensor, QuantisedTensor)
        raw = []
        for source, first, size in tensor.inputs():
            raw.append(np.empty(size, np.uint8))
            files.read([(source, first, bytes_in(raw[-1]))])
        assert torch.equal(tensor.dequantised(raw, torch.float32), meaning.float())
    files.close()


@pytest.mark.parametrize("name", WHOLE_MODELS)
def test_weights_and_logits_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    file_format = FILE_FORMATS[name]
    folder, plain = tmp_path / "quantised", tmp_path / "plain"
    config = write_quantised(file_format, folder, plain)
    reference = load_reference(plain, config)
    loaded = load(folder, dtype=torch.float32)

    compare_experts(loaded, reference)
    for layer in loaded.layers:
        kinds = {matrix.form.kind for matrix in layer.format.matrices}
        assert kinds == {KINDS.get(name) or KINDS[name.split()[0].rstrip(",")]}
        assert {m.name for m in layer.format.matrices} == {"gate_up_proj", "down_proj"}
    stock_parameters = dict(reference.named_parameters())
    for parameter, weight in loaded.model.named_parameters():
        assert torch.equal(weight, stock_parameters[parameter]), parameter

    transposed = loaded.layers[0].math.transposed
    expected_logits = logits(reference)
    attach_plain_runner(loaded.layers, loaded.store)
    actual_logits = logits(loaded.model)
    for expected, actual in zip(expected_logits, actual_logits, strict=True):
        assert torch.isfinite(expected).all()
        assert expected.std() > 0.03
        if transposed:
            # The reference multiplies by (inputs, outputs) and may add up in another order.
            assert (expected - actual).abs().max() <= 1e-5 * expected.abs().max()
            note(file_format.family, "MXFP4", "within 1e-05")
        else:
            assert torch.equal(expected, actual)

    assert read_shape(folder, torch.float32) == loaded.shape
    assert loaded.shape.expert_bytes == loaded.store.slot_bytes
    stock = reference.get_submodule(loaded.layers[0].name)
    plain_bytes = sum(weight[0].nbytes for weight in stock.parameters())
    assert loaded.shape.expert_bytes < 0.5 * plain_bytes


@pytest.mark.parametrize("name", PACKED_FORMATS)
def test_experts_that_are_packed_anew_keep_every_number(name: str, tmp_path: Path) -> None:
    folder, plain = tmp_path / "quantised", tmp_path / "plain"
    config = write_quantised(PACKED_FORMATS[name], folder, plain)
    loaded = load(folder, dtype=torch.float32)
    for layer in loaded.layers:
        assert all(is_packed(matrix) for matrix in layer.format.matrices)
    compare_experts(loaded, load_reference(plain, config))


@pytest.mark.parametrize(
    "name", ["fp8 blocks", "int4 groups", "int4 groups, zeros", "awq", "gptq", "mxfp4"]
)
def test_layers_and_matrices_that_were_left_plain_stay_plain(name: str, tmp_path: Path) -> None:
    folder, plain = tmp_path / "quantised", tmp_path / "plain"

    def keep(tensor: str) -> bool:
        return "layers.0" in tensor or "down_proj" in tensor or "self_attn.k_proj" in tensor

    config = write_quantised(FILE_FORMATS[name], folder, plain, keep, torch.bfloat16)
    loaded = load(folder)
    assert loaded.model.dtype == torch.bfloat16
    first, second = loaded.layers
    assert first.format.matrices == ()
    assert [matrix.name for matrix in second.format.matrices] == ["gate_up_proj"]
    assert first.format.size_bytes > second.format.size_bytes
    reference = load_reference(plain, config)
    # Zeros and float16 scales are rounded to bfloat16 once more; everything else is exact.
    rounded = "zeros" in name or FILE_FORMATS[name].dtype == "float16"
    compare_experts(loaded, reference, bound=2**-6 if rounded else 0.0)
    attach_plain_runner(loaded.layers, loaded.store)
    for expected, actual in zip(logits(reference), logits(loaded.model), strict=True):
        # In bfloat16 experts take faster ways that round otherwise.
        assert (expected - actual).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(("bfloat16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_weights_made_for_float16_stay_so_where_bfloat16_is_only_imitated(
    bfloat16: bool, expected: torch.dtype, tmp_path: Path
) -> None:
    half = half_for(dataclasses.replace(emulated_profile(), bfloat16=bfloat16))
    folder, plain = tmp_path / "quantised", tmp_path / "plain"
    write_quantised(FILE_FORMATS["awq"], folder, plain, lambda tensor: False, torch.float16)
    assert read_config(folder, half).dtype == expected
    loaded = load(folder, half=half)
    assert loaded.model.dtype == expected
    assert loaded.shape == read_shape(folder, half=half)
    assert foresee_shape(folder, half=half).shape == loaded.shape
    # Weights that are not quantised are computed as they are stored.
    make_checkpoint("qwen3_moe", tmp_path / "stored", "float16")
    assert read_config(tmp_path / "stored", half).dtype == torch.float16


@pytest.mark.families
@pytest.mark.parametrize(
    "family",
    ["ernie4_5_moe", "glm4_moe", "hy_v3", "jamba", "minimax_m2", "nemotron_h", "qwen3_next"],
)
def test_weights_of_other_families_are_those_of_the_plain_model(
    family: str, tmp_path: Path
) -> None:
    file_format = dataclasses.replace(FILE_FORMATS["fp8 blocks"], family=family)
    folder, plain = tmp_path / "quantised", tmp_path / "plain"
    config = write_quantised(file_format, folder, plain)
    loaded = load(folder, dtype=torch.float32)
    assert all(len(layer.format.matrices) == 2 for layer in loaded.layers)
    reference = load_reference(plain, config)
    compare_experts(loaded, reference)
    stock = dict(reference.named_parameters())
    for parameter, weight in loaded.model.named_parameters():
        assert torch.equal(weight, stock[parameter]), parameter


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("fp8 blocks", lambda: FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))),
        ("mxfp4", lambda: Mxfp4Config(dequantize=True)),
    ],
)
def test_what_transformers_dequantises_itself_is_the_same(
    name: str, chosen: Callable[[], Any], tmp_path: Path
) -> None:
    write_quantised(FILE_FORMATS[name], tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=chosen(),
        dtype=torch.bfloat16,
        experts_implementation="eager",
        local_files_only=True,
    ).eval()
    loaded = load(tmp_path)
    compare_experts(loaded, stock)
    theirs = dict(stock.named_parameters())
    for parameter, weight in loaded.model.named_parameters():
        assert torch.equal(weight, theirs[parameter]), parameter


@pytest.mark.parametrize("together_bytes", [2**24, 3000, 1])
def test_any_expert_can_be_read_again_alone(
    together_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many of its tensors are read together, in no more memory than readers are given."""
    monkeypatch.setattr(store_recipes, "_TOGETHER_BYTES", together_bytes)
    write_quantised(FILE_FORMATS["awq"], tmp_path)
    loaded = load(tmp_path)
    files = SafetensorsFiles(tmp_path)
    reads: list[tuple[str, int]] = []
    quantisation = read_quantisation(tmp_path)
    skeleton = build_skeleton(read_config(tmp_path), torch.bfloat16)
    layers = find_moe_layers(skeleton, torch.bfloat16)
    checkpoint = sort_checkpoint(skeleton, layers, fold(files.tensors, quantisation))
    source = RecipeSource(files, checkpoint.sources)
    expert = ExpertId(1, 5)
    again = torch.empty(checkpoint.sources[1].format.size_bytes, dtype=torch.uint8)
    read = files.read

    def noting(wanted: Sequence[tuple[str, int, memoryview]]) -> None:
        reads.extend((name, len(buffer)) for name, _, buffer in wanted)
        read(wanted)

    files.read = noting  # type: ignore[method-assign]
    source.read(expert, bytes_in(again))
    scratch_bytes = reading_bytes(checkpoint.sources) - store_recipes._UNPACKING_BYTES
    assert source._own.scratch.size == scratch_bytes
    kept = views(loaded.store.bytes_of(expert), loaded.layers[1].format)
    for name, part in views(again, loaded.layers[1].format).items():
        assert torch.equal(part, kept[name])
    assert len(reads) == 9  # Three tensors of each of gate, up and down.
    assert all(".layers.1.mlp.experts.5." in name for name, _ in reads)
    assert sum(size for _, size in reads) == sum(
        files.tensors[name].size_bytes for name, _ in reads
    )
    source.close()


GATE = "model.layers.1.mlp.experts.3.gate_proj"
QUERY = "model.layers.0.self_attn.q_proj"
BLOCKS = "model.layers.0.mlp.experts.gate_up_proj"


def shuffled(tensors: dict[str, Tensor]) -> None:
    index = tensors[f"{GATE}.g_idx"]
    tensors[f"{GATE}.g_idx"] = index[torch.randperm(len(index), generator=torch.manual_seed(1))]


def cut(name: str, rows: int = 1) -> Callable[[dict[str, Tensor]], object]:
    """Drop the last rows of a tensor."""
    return lambda tensors: tensors.update({name: tensors[name][:-rows].contiguous()})


DAMAGED: list[tuple[str, Callable[[dict[str, Tensor]], object], type[ModelError], str]] = [
    ("gptq", shuffled, UnsupportedModelError, "act-order"),
    ("gptq", lambda t: t[f"{QUERY}.g_idx"].zero_(), UnsupportedModelError, "act-order"),
    ("gptq", lambda t: t[f"{GATE}.qzeros"].fill_(0), ModelFilesError, "sym"),
    ("gptq", lambda t: t.pop(f"{GATE}.qzeros"), ModelFilesError, "no .*qzeros"),
    ("gptq", lambda t: t.pop(f"{GATE}.scales"), ModelFilesError, "no .*scales"),
    ("gptq", lambda t: t.pop(f"{GATE}.qweight"), ModelFilesError, "experts"),
    ("gptq", cut(f"{GATE}.g_idx"), ModelFilesError, r"g_idx has the shape \(31,\)"),
    ("awq", cut(f"{GATE}.qzeros"), ModelFilesError, r"qzeros has the shape \(1, 4\)"),
    ("awq", cut(f"{GATE}.scales"), ModelFilesError, r"scales has the shape \(1, 32\)"),
    ("awq", cut(f"{GATE}.qweight", 3), ModelFilesError, "groups of 16 do not divide"),
    ("awq", cut(f"{QUERY}.qweight", 16), ModelFilesError, "scales has the shape"),
    ("fp8 blocks", lambda t: t.pop(f"{GATE}.weight_scale_inv"), ModelFilesError, "no .*scale"),
    ("fp8 blocks", cut(f"{GATE}.weight_scale_inv"), ModelFilesError, r"scale_inv of shape \(1, 2"),
    ("fp8 blocks", cut(f"{QUERY}.weight_scale_inv"), ModelFilesError, "fits no scheme"),
    ("fp8 rows", cut(f"{GATE}.weight_scale"), ModelFilesError, "fits no scheme"),
    ("int4 groups", cut(f"{GATE}.weight_scale"), ModelFilesError, "fits no scheme"),
    ("int4 groups", lambda t: t.pop(f"{GATE}.weight_scale"), ModelFilesError, "no .*weight_scale"),
    (
        "int4 groups",
        lambda t: t.update({f"{GATE}.weight_g_idx": torch.arange(32)}),
        UnsupportedModelError,
        "act-order",
    ),
    (
        "int4 groups",
        lambda t: t.update({f"{GATE}.weight": torch.ones(32, 32)}),
        ModelFilesError,
        "beside",
    ),
    ("int4 groups, zeros", lambda t: t.pop(f"{GATE}.weight_zero_point"), ModelFilesError, "zero"),
    ("int4 groups, zeros", cut(f"{GATE}.weight_zero_point"), ModelFilesError, "zero_point has"),
    ("mxfp4", lambda t: t.pop(f"{BLOCKS}_scales"), ModelFilesError, "no .*_scales"),
    ("mxfp4", cut(f"{BLOCKS}_scales"), ModelFilesError, r"scales has the shape \(7,"),
    (
        "fp8 blocks",
        lambda t: t.update({f"{GATE}.weight": torch.ones(32, 32)}),
        ModelError,
        "not quantised",
    ),
]


@pytest.mark.parametrize(
    ("name", "damage", "expected", "named"), DAMAGED, ids=[f"{d[0]}: {d[3]}" for d in DAMAGED]
)
def test_quantised_tensors_that_do_not_fit_are_refused_by_name(
    name: str,
    damage: Callable[[dict[str, Tensor]], object],
    expected: type[ModelError],
    named: str,
    tmp_path: Path,
) -> None:
    write_quantised(FILE_FORMATS[name], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(expected, match=named) as refused:
        load(tmp_path)
    assert refused.value.next_step


STORED = ("BF16", "F16", "F32", "F8_E4M3", "F8_E8M0", "I32", "I64", "I8", "U8")


@pytest.mark.parametrize("name", FILE_FORMATS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_and_dtype_is_folded_or_refused_and_never_crashes(
    name: str, data: st.DataObject
) -> None:
    if name == "mxfp4":
        packed = {"x_blocks": torch.empty(2, 8, 2, 16), "x_scales": torch.empty(2, 8, 2)}
    else:
        made, _ = FILE_FORMATS[name].pack(torch.Generator(), 48, 32)
        packed = {f"x.{suffix}": tensor for suffix, tensor in made.items()}
    dtypes = {torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32"}
    table = {}
    changed = data.draw(st.sampled_from(sorted(packed)))
    few = st.integers(0, 2) | st.integers(0, 50)
    for tensor, values in packed.items():
        shape, stored = tuple(values.shape), dtypes.get(values.dtype, "U8")
        if tensor == changed:
            rank = len(shape) if data.draw(st.booleans()) else data.draw(st.integers(0, 4))
            shape = tuple(data.draw(st.lists(few, min_size=rank, max_size=rank)))
            stored = data.draw(st.sampled_from([stored, *STORED]))
        table[tensor] = TensorEntry(tensor, 0, 0, math.prod(shape), stored, None, shape)
    with contextlib.suppress(ModelError):
        fold(table, quantisation_from(FILE_FORMATS[name].config))


def test_a_config_that_describes_other_groups_than_the_files_is_refused(tmp_path: Path) -> None:
    write_quantised(FILE_FORMATS["awq"], tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["quantization_config"]["group_size"] = 8
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelFilesError, match=r"scales has the shape \(2, 32\) instead of \(4"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["fp8 blocks, deepseek", "awq"])
def test_large_dense_matrices_are_dequantised_in_pieces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_quantised(FILE_FORMATS[name], tmp_path)
    whole = dict(load(tmp_path).model.named_parameters())
    monkeypatch.setattr(weight_forms, "_DEQUANTISE_ITEMS", 500)
    for parameter, weight in load(tmp_path).model.named_parameters():
        assert torch.equal(weight, whole[parameter]), parameter
