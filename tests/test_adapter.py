"""The seam into transformers: what it takes over, what it refuses, and that it leaves no trace."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.mixtral import modeling_mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.monkey_patching import get_patch_mapping

from runtime import adapter
from runtime.adapter import (
    IMPLEMENTATION,
    attach,
    check_every_moe_layer_is_ours,
    detach,
    find_moe_layers,
    stripped_experts,
)
from runtime.adapter_config import build_skeleton
from runtime.adapter_exceptions import stand_ins
from runtime.adapter_recipes import sort_checkpoint
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.safetensors_files import SafetensorsFiles
from runtime.store import Conversion, Piece
from tests.families import EXPERTS, FAMILIES, MORE_FAMILIES, TOP_K, make_checkpoint, tiny


def skeleton_of(family: str) -> Any:
    return build_skeleton(FAMILIES[family](), torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_moe_layer_is_found_with_its_router_and_sizes(family: str) -> None:
    skeleton = skeleton_of(family)
    layers = find_moe_layers(skeleton, torch.bfloat16)
    assert [layer.index for layer in layers] == list(range(len(layers)))
    for layer in layers:
        assert (layer.experts, layer.top_k) == (EXPERTS, TOP_K)
        assert layer.router is not None
        assert skeleton.get_submodule(layer.name) is layer.module
        weights = sum(p.numel() for p in layer.module.parameters()) * 2 // EXPERTS
        assert weights <= layer.format.size_bytes < weights + 64 * 4
        assert {part.dtype for part in layer.format.parts} == {"bfloat16"}


def test_calls_go_to_what_is_attached_and_nowhere_else() -> None:
    model = AutoModelForCausalLM.from_config(
        FAMILIES["qwen3_moe"](), experts_implementation=IMPLEMENTATION
    ).eval()
    layers = find_moe_layers(model, torch.float32)
    ids = torch.ones((1, 3), dtype=torch.int64)
    with pytest.raises(RuntimeError, match="attach"):
        model(ids)
    calls: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []

    def run(
        layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        calls.append((layer, tuple(hidden.shape), tuple(index.shape), tuple(weights.shape)))
        return torch.zeros_like(hidden)

    attach(layers, run)
    model(ids)
    assert calls == [(n, (3, 32), (3, TOP_K), (3, TOP_K)) for n in range(2)]
    detach(layers)
    with pytest.raises(RuntimeError, match="attach"):
        model(ids)


def test_stripping_ends_with_the_block_even_when_loading_raises() -> None:
    original = modeling_qwen3_moe.Qwen3MoeExperts
    skeleton = skeleton_of("qwen3_moe")
    config = FAMILIES["qwen3_moe"]()
    with stripped_experts(skeleton):
        model = AutoModelForCausalLM.from_config(config)
        layer = find_moe_layers(model, torch.float32)[0]
        assert not list(layer.module.parameters())
        assert isinstance(layer.module, original)
        assert layer.format == find_moe_layers(skeleton, torch.float32)[0].format
    assert list(AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts.parameters())

    config.hidden_act = "no such activation"
    with pytest.raises(KeyError), stripped_experts(skeleton):
        AutoModelForCausalLM.from_config(config)
    assert modeling_qwen3_moe.Qwen3MoeExperts is original
    assert get_patch_mapping() == {}
    modules = [m for name, m in sys.modules.items() if name.startswith("transformers.models.qwen")]
    for module in modules:
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__name__ == "Qwen3MoeExperts":
                assert kind is original


@pytest.mark.parametrize(
    "family", ["dbrx", "doge", "jetmoe", "nllb-moe", "switch_transformers", "diffusion_gemma"]
)
def test_families_that_would_ignore_us_are_refused_by_name(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip("not in this transformers")
    model = nn.Module()
    model.config = type("Config", (), {"model_type": family})()
    with pytest.raises(UnsupportedModelError, match=family):
        check_every_moe_layer_is_ours(model)


def test_a_new_family_without_the_interface_is_refused_for_what_it_holds() -> None:
    llama4 = AutoModelForCausalLM.from_config(tiny("llama4_text"))
    llama4.config.model_type = "brand_new"
    with pytest.raises(UnsupportedModelError, match="Llama4TextExperts"):
        check_every_moe_layer_is_ours(llama4)


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        build_skeleton(tiny("llama"), torch.float32)


def test_one_experts_module_that_is_not_ours_is_enough_to_refuse() -> None:
    skeleton = skeleton_of("mixtral")

    class OldExperts(nn.Module):
        pass

    skeleton.model.layers[1].mlp.experts = OldExperts()
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.experts \(OldExperts\)"):
        check_every_moe_layer_is_ours(skeleton)
    assert modeling_mixtral.MixtralExperts is not None


def test_a_router_whose_experts_are_not_ours_is_enough_to_refuse() -> None:
    skeleton = skeleton_of("mixtral")
    # Whatever they are called: nothing here is named like experts.
    skeleton.model.layers[1].mlp.experts = nn.ModuleList([nn.Linear(2, 2)])
    skeleton.model.layers[1].mlp.register_module("parts", skeleton.model.layers[1].mlp.experts)
    del skeleton.model.layers[1].mlp.experts
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp \(MixtralSparseMoeBlock\)"):
        check_every_moe_layer_is_ours(skeleton)


@pytest.mark.parametrize("family", ["llama4_text", "longcat_flash", "step3p7"])
def test_stand_ins_leave_no_trace(family: str) -> None:
    config = MORE_FAMILIES[family]()
    build_skeleton(config, torch.float32)
    original = next(kind for kind in stand_ins() if kind.__module__.split(".")[2] in family)
    module = sys.modules[original.__module__]
    config.hidden_act = "no such activation"
    config.get_text_config().hidden_act = "no such activation"
    with pytest.raises(ModelFilesError):
        build_skeleton(config, torch.float32)
    assert getattr(module, original.__name__) is original
    assert get_patch_mapping() == {}


def test_merged_families_are_read_straight_from_their_files(tmp_path: Path) -> None:
    make_checkpoint("deepseek_v3", tmp_path)
    skeleton = skeleton_of("deepseek_v3")
    layers = find_moe_layers(skeleton, torch.float32)
    files = SafetensorsFiles(tmp_path)
    checkpoint = sort_checkpoint(skeleton, layers, files.tensors)
    steps = [step for source in checkpoint.sources for recipe in source.recipes for step in recipe]
    assert all(isinstance(step, Piece) for step in steps)
    assert not any(".experts." in name for name in checkpoint.dense)
    files.close()


def test_foreign_layouts_take_the_detour_and_only_they(tmp_path: Path) -> None:
    make_checkpoint("inkling2_text", tmp_path)
    skeleton = build_skeleton(MORE_FAMILIES["inkling2_text"](), torch.float32)
    files = SafetensorsFiles(tmp_path)
    layers = find_moe_layers(skeleton, torch.float32)
    recipe = sort_checkpoint(skeleton, layers, files.tensors).sources[0].recipes[0]
    assert any(isinstance(step, Conversion) for step in recipe)
    files.close()


@pytest.mark.parametrize("fault", ["missing", "wrong shape", "foreign dtype"])
def test_an_expert_that_does_not_fit_is_named(fault: str, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    skeleton = skeleton_of("qwen3_moe")
    files = SafetensorsFiles(tmp_path)
    tensors = dict(files.tensors)
    files.close()
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    entry = tensors.pop(name)
    if fault == "wrong shape":
        tensors[name] = dataclasses.replace(entry, shape=entry.shape[::-1])
    elif fault == "foreign dtype":
        tensors[name] = dataclasses.replace(entry, stored="F8_E4M3", dtype=None)
    expected = UnsupportedModelError if fault == "foreign dtype" else ModelFilesError
    with pytest.raises(expected, match=r"layers\.1\.mlp\.experts"):
        sort_checkpoint(skeleton, find_moe_layers(skeleton, torch.float32), tensors)


def test_a_norm_on_the_card_serves_rows_computed_elsewhere() -> None:
    norm = torch.nn.LayerNorm(4)
    normalize = adapter._anywhere(norm)
    x = torch.randn(3, 4)
    assert torch.equal(normalize(x), norm(x))
    elsewhere = normalize(x.to("meta"))
    assert (elsewhere.device.type, elsewhere.shape) == ("meta", x.shape)
    assert all(weight.device.type == "cpu" for weight in norm.parameters())
