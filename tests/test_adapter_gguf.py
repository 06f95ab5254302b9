"""Models in GGUF files give the very logits of stock models with the numbers they stand for."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime import adapter_gguf
from runtime.adapter import find_moe_layers
from runtime.adapter_config import build_skeleton
from runtime.core import ExpertId
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.formats import Form
from runtime.kernels import views
from runtime.loader import LoadedModel, read_shape
from runtime.loader_source import open_source
from runtime.store_recipes import RecipeSource
from runtime.weight_forms import dequantise, held
from tests.checkpoints import attach_plain_runner, load, logits
from tests.family_table import note
from tests.gguf_models import FAMILIES, GgufModel, make_model
from tests.gguf_writer import QUANTISED, Stored, gguf_bytes, stored, write_split

# Types as llama.cpp mixes them: of the experts, of their last matrix, of dense weights.
MIXES = {
    "deepseek_v2": ("Q8_0", "", "Q8_0"),
    "deepseek_v3": ("Q4_K", "Q6_K", "Q4_K"),
    "glm4_moe": ("Q4_K", "Q5_K", "Q6_K"),
    "minimax_m2": ("Q6_K", "", "Q5_K"),
    "mixtral": ("Q4_0", "Q8_0", "Q4_1"),
    "qwen2_moe": ("Q4_1", "", "BF16"),
    "qwen3_5_moe_text": ("Q4_K", "Q6_K", "Q8_0"),
}
CASES = [
    ("qwen3_moe", (*QUANTISED, "F32", "F16", "BF16"), "", "IQ4_NL"),
    ("gpt_oss", ("MXFP4", "Q4_K", "Q8_0", "F32"), "", "F16"),
    *((family, *kinds) for family, kinds in MIXES.items()),
]


def check(made: GgufModel, path: Path) -> LoadedModel:
    """Assert that every expert and every logit is that of the stock model."""
    expected = logits(made.reference)
    loaded = load(made.write(path), dtype=torch.float32)
    for layer in loaded.layers:
        weights = made.reference.get_submodule(layer.name)
        quantised = {matrix.name: matrix for matrix in layer.format.matrices}
        for expert in range(layer.experts):
            parts = views(loaded.store.bytes_of(ExpertId(layer.index, expert)), layer.format)
            for name in ("gate_up_proj", "down_proj"):
                whole = getattr(weights, name)[expert]
                if name not in quantised:
                    assert torch.equal(parts[name], whole)
                    continue
                ours = dequantise(held(quantised[name], parts), torch.float32)
                assert torch.equal(ours.t() if layer.math.transposed else ours, whole)
    attach_plain_runner(loaded.layers, loaded.store)
    actual = logits(loaded.model)
    assert all(torch.isfinite(step).all() and step.std() > 0.03 for step in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        if any(layer.math.transposed and layer.format.matrices for layer in loaded.layers):
            # Quantised matrices are kept outputs first: the same products, added in another order.
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)
        else:
            assert torch.equal(ours, theirs)
    return loaded


@pytest.mark.parametrize(("family", "experts", "down", "dense"), CASES)
def test_logits_are_those_of_the_dequantised_model(
    family: str, experts: str | tuple[str, ...], down: str, dense: str, tmp_path: Path
) -> None:
    check(make_model(family, experts, down, dense), tmp_path / "m.gguf")
    kinds = (experts,) if isinstance(experts, str) else experts
    note(family, "GGUF", ", ".join(k for k in (*kinds, down) if k in (*QUANTISED, "MXFP4")))


def test_every_family_is_among_the_cases() -> None:
    assert {case[0] for case in CASES} == set(FAMILIES)


@pytest.mark.parametrize(
    ("family", "name", "other"),
    [
        ("qwen3_moe", "blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"),
        ("gpt_oss", "blk.1.ffn_gate_exps.bias", "blk.1.ffn_up_exps.bias"),
        ("qwen3_moe", "blk.1.attn_norm.weight", "blk.1.ffn_norm.weight"),
    ],
)
def test_the_comparison_notices_tensors_that_changed_places(
    family: str, name: str, other: str, tmp_path: Path
) -> None:
    made = make_model(family)
    first = made.tensors[name]
    made.tensors[name], made.tensors[other] = made.tensors[other], first
    if name.endswith("norm.weight"):
        made.tensors[name] = stored(torch.full((256,), 1.25))
    with pytest.raises(AssertionError):
        check(made, tmp_path / "m.gguf")


def test_the_comparison_notices_rows_left_in_the_other_rotary_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_gguf, "_turned", lambda block, config: 0)
    with pytest.raises(AssertionError):
        check(make_model("mixtral"), tmp_path / "m.gguf")


def test_experts_stay_as_small_as_their_type(tmp_path: Path) -> None:
    made = make_model("qwen3_moe", "Q4_K", "Q6_K")
    loaded = check(made, tmp_path / "m.gguf")
    up, down = loaded.layers[0].format.matrices
    assert up.form == Form("int4", 1, 32, zeros=True)
    assert down.form == Form("int8", 1, 16)
    numbers = 256 * 512, 256 * 256
    size = numbers[0] // 2 + 8 * numbers[0] // 32 + numbers[1] + 4 * numbers[1] // 16
    assert loaded.layers[0].format.size_bytes == size
    assert read_shape(tmp_path / "m.gguf") == dataclasses.replace(
        loaded.shape, dense_bytes=read_shape(tmp_path / "m.gguf").dense_bytes
    )


def test_gate_and_up_of_different_types_are_joined_exactly(tmp_path: Path) -> None:
    made = make_model("qwen3_moe", "Q4_K")
    donor = make_model("qwen3_moe", "Q6_K")
    made.tensors["blk.0.ffn_up_exps.weight"] = donor.tensors["blk.0.ffn_up_exps.weight"]
    with torch.no_grad():
        ours, theirs = (m.reference.model.layers[0].mlp.experts for m in (made, donor))
        ours.gate_up_proj[:, 256:] = theirs.gate_up_proj[:, 256:]
    loaded = check(made, tmp_path / "m.gguf")
    assert loaded.layers[0].format.matrices[0].form == Form("int8", 1, 16, zeros=True)
    assert loaded.layers[1].format.matrices[0].form == Form("int4", 1, 32, zeros=True)


def test_a_plain_gate_beside_a_quantised_up_makes_a_plain_matrix(tmp_path: Path) -> None:
    for family in ("qwen3_moe", "gpt_oss"):
        made = make_model(family, "Q8_0")
        donor = make_model(family, "F32")
        made.tensors["blk.0.ffn_up_exps.weight"] = donor.tensors["blk.0.ffn_up_exps.weight"]
        with torch.no_grad():
            ours, theirs = (m.reference.model.layers[0].mlp.experts for m in (made, donor))
            if family == "gpt_oss":
                ours.gate_up_proj[..., 1::2] = theirs.gate_up_proj[..., 1::2]
            else:
                ours.gate_up_proj[:, 256:] = theirs.gate_up_proj[:, 256:]
        loaded = check(made, tmp_path / "m.gguf")
        assert [matrix.name for matrix in loaded.layers[0].format.matrices] == ["down_proj"]


def test_one_tensor_may_hold_gate_and_up(tmp_path: Path) -> None:
    made = make_model("qwen3_moe", "Q5_K")
    for layer in range(2):
        halves = [made.tensors.pop(f"blk.{layer}.ffn_{x}_exps.weight") for x in ("gate", "up")]
        rows = [
            half.content[e * len(half.content) // 4 :][: len(half.content) // 4]
            for e in range(4)
            for half in halves
        ]
        whole = Stored("Q5_K", (4, 512, 256), b"".join(rows))
        made.tensors[f"blk.{layer}.ffn_gate_up_exps.weight"] = whole
    check(made, tmp_path / "m.gguf")


def test_a_model_without_an_output_matrix_uses_its_embeddings(tmp_path: Path) -> None:
    made = make_model("qwen3_moe", dense="Q4_0")
    del made.tensors["output.weight"]
    with torch.no_grad():
        made.reference.lm_head.weight.copy_(made.reference.model.embed_tokens.weight)
    loaded = check(made, tmp_path / "m.gguf")
    assert loaded.model.config.tie_word_embeddings


def test_blocks_that_guess_further_tokens_are_left_out(tmp_path: Path) -> None:
    made = make_model("glm4_moe")
    made.tensors["blk.2.nextn.eh_proj.weight"] = stored(torch.ones(4, 8))
    made.tensors["blk.2.attn_norm.weight"] = stored(torch.ones(256))
    check(made, tmp_path / "m.gguf")


def test_split_files_load_like_one(tmp_path: Path) -> None:
    made = make_model("qwen3_moe", "Q4_K")
    names = list(made.tensors)
    parts = [{name: made.tensors[name] for name in names[n::3]} for n in range(3)]
    write_split(tmp_path, "m", made.metadata, [{}, *parts])
    loaded = load(tmp_path, dtype=torch.float32)
    attach_plain_runner(loaded.layers, loaded.store)
    assert torch.equal(logits(loaded.model)[0], logits(made.reference)[0])
    assert loaded.shape.name == "m"


def test_bfloat16_is_computed_unless_the_file_is_float32(tmp_path: Path) -> None:
    for kind, dtype in (("F32", torch.float32), ("Q8_0", torch.bfloat16), ("F16", torch.bfloat16)):
        loaded = load(make_model("qwen3_moe", kind, dense=kind).write(tmp_path / "m.gguf"))
        assert loaded.model.dtype == dtype
        attach_plain_runner(loaded.layers, loaded.store)
        assert torch.isfinite(logits(loaded.model)[0]).all()


def test_a_recipe_reads_one_expert_and_can_be_run_again(tmp_path: Path) -> None:
    path = make_model("qwen3_moe", "Q4_K", "Q6_K").write(tmp_path / "m.gguf")
    loaded = load(path, dtype=torch.bfloat16)
    source = open_source(path)
    skeleton = build_skeleton(source.config, torch.bfloat16)
    layers = source.sort(skeleton, find_moe_layers(skeleton, torch.bfloat16)).sources
    recipes = RecipeSource(source.files, layers)
    for expert in (ExpertId(1, 3), ExpertId(0, 2), ExpertId(1, 3)):
        again = bytearray(b"\xa5" * layers[0].format.size_bytes)
        recipes.read(expert, memoryview(again))
        assert bytes(again) == loaded.store.bytes_of(expert).numpy().tobytes()
    steps: list[Any] = [step for layer in layers for recipe in layer.recipes for step in recipe]
    read_bytes = sum(size_bytes for step in steps for _, _, size_bytes in step.inputs)
    stored_bytes = [e.size_bytes for e in source.files.tensors.values() if "_exps" in e.name]
    assert read_bytes == sum(stored_bytes)
    recipes.close()


def broken(change: str) -> GgufModel:
    """A whole model but for one thing."""
    made = make_model("qwen3_moe", "Q8_0")
    tensors, metadata = made.tensors, made.metadata
    if change == "an expert missing":
        del tensors["blk.1.ffn_up_exps.weight"]
    elif change == "a dense tensor missing":
        del tensors["blk.1.attn_q.weight"]
    elif change == "a tensor too many":
        tensors["blk.0.attn_q.bias"] = stored(torch.zeros(256))
    elif change == "an unknown tensor":
        tensors["rope_freqs.weight"] = stored(torch.ones(32))
    elif change == "one place for two tensors":
        tensors["blk.0.post_attention_norm.weight"] = tensors["blk.0.ffn_norm.weight"]
    elif change == "too few experts":
        whole = tensors["blk.0.ffn_down_exps.weight"]
        content = whole.content[: len(whole.content) // 4 * 3]
        tensors["blk.0.ffn_down_exps.weight"] = Stored(whole.type, (3, 256, 256), content)
    elif change == "a wrong width":
        tensors["blk.0.attn_v.weight"] = stored(torch.zeros(128, 512))
    elif change == "an axis turned":
        tensors["output.weight"] = stored(torch.zeros(256, 160))
    else:
        key, value = change.split(" = ")
        values: dict[str, Any] = {"a list": [8, 16], "4.5": 4.5}
        metadata[key] = int(value) if value.isdigit() else values.get(value, value)
        if value == "None":
            del metadata[key]
    return made


BROKEN = {
    "an expert missing": "lack the tensor blk.1.ffn_up_exps.weight",
    "a dense tensor missing": "lack 1 tensors of the model, among them .*q_proj",
    "too few experts": "blk.0.ffn_down_exps.weight has the shape .3, 256, 256.",
    "a wrong width": "blk.0.attn_v.weight has the shape",
    "an axis turned": "output.weight has the shape",
    "one place for two tensors": "are both model.layers.0.post_attention_layernorm.weight",
    "qwen3moe.expert_count = None": "does not state qwen3moe.expert_count",
    "qwen3moe.expert_count = 1000000": "not between",
    "qwen3moe.expert_count = 5": "instead of",
    "qwen3moe.expert_count = 4.5": "expert_count is '4.5'",
    "qwen3moe.expert_used_count = 9": "more than the 4 experts",
    "qwen3moe.block_count = words": "block_count is 'words'",
    "qwen3moe.block_count = 4000000000": "num_hidden_layers = 4000000000",
    "qwen3moe.block_count = 3": "lack the tensor blk.2",
    "qwen3moe.embedding_length = 0": "hidden_size = 0",
    "qwen3moe.attention.head_count = 0": "num_attention_heads",
    "qwen3moe.attention.head_count_kv = a list": "head_count_kv is",
    "qwen3moe.attention.head_count_kv = 3": "fit|built|shape",
    "general.architecture = 7": "states no architecture",
    "general.architecture = None": "states no architecture",
}


@pytest.mark.parametrize("change", BROKEN)
def test_files_that_do_not_fit_are_refused_by_name(change: str, tmp_path: Path) -> None:
    path = broken(change).write(tmp_path / "m.gguf")
    with pytest.raises(ModelFilesError, match=BROKEN[change]):
        load(path)


@pytest.mark.parametrize("key", ["time_step_rank", "inner_size", "group_count", "state_size"])
@pytest.mark.parametrize("value", [0, 3, 2**31])
def test_sizes_of_linear_attention_have_to_fit_its_tensors(
    key: str, value: int, tmp_path: Path
) -> None:
    made = make_model("qwen3_5_moe_text")
    made.metadata[f"qwen35moe.ssm.{key}"] = value
    with pytest.raises(ModelFilesError, match="qwen35moe.ssm"):
        read_shape(made.write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("a tensor too many", "blk.0.attn_q.bias has no place in a qwen3_moe model"),
        ("an unknown tensor", "rope_freqs.weight has no place"),
        ("general.architecture = llama", "no routed experts"),
        ("general.architecture = gemma4", "architecture 'gemma4' cannot be run yet"),
        ("qwen3moe.rope.scaling.type = longrope", "rule 'longrope'"),
    ],
)
def test_what_this_code_does_not_know_is_refused_and_not_guessed(
    change: str, words: str, tmp_path: Path
) -> None:
    path = broken(change).write(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModelError, match=words) as caught:
        load(path)
    assert caught.value.next_step
    with pytest.raises(UnsupportedModelError, match=words):
        read_shape(path)


ODD: tuple[Any, ...] = (0, 1, -1, 7, 2**32 - 1, 1.5, float("nan"), "x", "", True, [1, 2], ["a"])


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_no_value_of_the_metadata_escapes_a_named_error(family: str, tmp_path: Path) -> None:
    made = make_model(family, "Q4_0")
    drawn = random.Random(3)
    refused = 0
    for _ in range(40):
        changes = {key: drawn.choice(ODD) for key in drawn.sample(sorted(made.metadata), 2)}
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf_bytes(made.metadata | changes, made.tensors))
        try:
            source = open_source(path)
            source.files.close()
            skeleton = build_skeleton(source.config, torch.bfloat16)
            source.sort(skeleton, find_moe_layers(skeleton, torch.bfloat16))
        except (ModelFilesError, UnsupportedModelError):
            refused += 1
    assert refused > 20
