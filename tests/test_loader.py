"""Loading, and the promise that stripped experts compute exactly what transformers computes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.qwen3_moe import modeling_qwen3_moe

from runtime import adapter_recipes
from runtime.core import ExpertId, LoadProgress
from runtime.errors import (
    CancelledError,
    ModelFilesError,
)
from runtime.kernels import views
from runtime.loader import read_shape
from tests.checkpoints import (
    attach_plain_runner,
    load,
    load_reference,
    logits,
    write_checkpoint,
)
from tests.families import FAMILIES, make_checkpoint


def check_family(family: str, folder: Path) -> None:
    """Assert that a stripped model gives the very logits of the stock one."""
    make_checkpoint(family, folder)
    reference = load_reference(folder, FAMILIES[family]())
    expected = logits(reference)
    loaded = load(folder)
    for layer in loaded.layers:
        weights = reference.get_submodule(layer.name)
        for expert in range(layer.experts):
            raw = loaded.store.bytes_of(ExpertId(layer.index, expert))
            for name, part in views(raw, layer.format).items():
                assert torch.equal(part, getattr(weights, name)[expert])
    attach_plain_runner(loaded.layers, loaded.store)
    actual = logits(loaded.model)
    assert all(torch.isfinite(step).all() and step.std() > 0.03 for step in expected)
    assert torch.equal(expected[0], actual[0])
    assert torch.equal(expected[1], actual[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers_to_the_last_bit(family: str, tmp_path: Path) -> None:
    check_family(family, tmp_path)


def test_the_comparison_notices_swapped_gate_and_up_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges: Callable[..., Any] = adapter_recipes._merges
    monkeypatch.setattr(adapter_recipes, "_merges", lambda lists, *rest: merges(lists[::-1], *rest))
    with pytest.raises(AssertionError):
        check_family("qwen3_moe", tmp_path)


def test_experts_stored_in_one_dtype_can_be_run_in_another(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    config = FAMILIES["qwen3_moe"]()
    config.dtype = "bfloat16"
    reference = load_reference(tmp_path, config)
    attach_plain_runner(loaded.layers, loaded.store)
    assert {part.dtype for part in loaded.layers[0].format.parts} == {"bfloat16"}
    assert torch.equal(logits(reference)[0], logits(loaded.model)[0])


def test_shards_and_a_single_file_load_alike(tmp_path: Path) -> None:
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    make_checkpoint("deepseek_v3", whole)
    write_checkpoint(FAMILIES["deepseek_v3"](), sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = load(whole), load(sharded)
    for layer, experts in enumerate(one.shape.experts):
        for expert in range(experts):
            at = ExpertId(layer, expert)
            parts = (views(m.store.bytes_of(at), m.store.format_of(layer)) for m in (one, many))
            first, second = parts
            assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_next", "gpt_oss"])
def test_the_stated_shape_is_the_loaded_one(family: str, tmp_path: Path) -> None:
    make_checkpoint(family, tmp_path)
    shape, loaded = read_shape(tmp_path), load(tmp_path)
    assert shape == loaded.shape
    tensors = {id(t): t for t in (*loaded.model.parameters(), *loaded.model.buffers())}
    assert shape.dense_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert shape.experts == tuple(layer.experts for layer in loaded.layers)
    assert shape.expert_bytes == loaded.store.slot_bytes
    attach_plain_runner(loaded.layers, loaded.store)
    sizes = []
    for tokens in (20, 50):
        with torch.inference_mode():
            ids = torch.ones((1, tokens), dtype=torch.int64)
            cache = loaded.model(ids, use_cache=True).past_key_values
        held = [vars(layer).values() for layer in cache.layers]
        sizes.append(sum(t.nbytes for layer in held for t in layer if isinstance(t, Tensor)))
    assert shape.kv_bytes_per_token == (sizes[1] - sizes[0]) // 30


def test_progress_covers_all_bytes_in_order(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path)
    steps: list[LoadProgress] = []
    loaded = load(tmp_path, progress=steps.append)
    done = [step.done_bytes for step in steps]
    assert done == sorted(done)
    assert steps[-1].done_bytes == steps[-1].total_bytes
    assert steps[-1].total_bytes >= loaded.store.ram_bytes
    assert all(step.text for step in steps)


_PEAK = """
import sys, torch
from pathlib import Path
from runtime.loader import load_model
torch.set_num_threads(1)
slabs = []
def allocate(size):
    slabs.append(size)
    return torch.empty(size, dtype=torch.uint8)
def peak():
    # Not getrusage: its figure starts from that of the parent process.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
load_model(Path(sys.argv[2]), torch_device=torch.device("cpu"), dtype=None,
           allocate_host=allocate, progress=print, cancelled=lambda: False)
slabs.clear()
before = peak()
loaded = load_model(Path(sys.argv[1]), torch_device=torch.device("cpu"), dtype=None,
                    allocate_host=allocate, progress=print, cancelled=lambda: False)
experts = loaded.shape.experts[0]
assert all(p.shape[0] != experts or p.dim() == 2 for p in loaded.model.parameters())
print("RESULT", peak() - before, sum(slabs), loaded.shape.dense_bytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
def test_experts_are_never_in_memory_twice(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    make_checkpoint("qwen3_moe", small, "bfloat16")
    config = FAMILIES["qwen3_moe"]()
    config.update({"hidden_size": 512, "moe_intermediate_size": 512})
    config.update({"num_local_experts": 64, "num_hidden_layers": 1, "dtype": "bfloat16"})
    write_checkpoint(config, large, "bfloat16")
    # Three layers from one, so that the writer need not hold them all.
    tensors = load_file(large / "model.safetensors")
    for name, tensor in list(tensors.items()):
        for layer in ("1", "2"):
            if ".layers.0." in name:
                tensors[name.replace(".layers.0.", f".layers.{layer}.")] = tensor.clone()
    save_file(tensors, large / "model.safetensors", {"format": "pt"})
    record = json.loads((large / "config.json").read_text()) | {"num_hidden_layers": 3}
    (large / "config.json").write_text(json.dumps(record | {"layer_types": None}))
    out = subprocess.run(
        [sys.executable, "-c", _PEAK, str(large), str(small)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    grown, slabs, dense = map(int, out.rpartition("RESULT")[2].split())
    assert slabs > 280 * 2**20
    assert 0.9 * slabs < grown < slabs + dense + 48 * 2**20


@pytest.mark.parametrize("after", [0, 1, 5, 20, 30])
def test_cancelling_stops_a_load_at_once_and_leaves_nothing(after: int, tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    asked = [0]

    def cancelled() -> bool:
        asked[0] += 1
        return asked[0] > after

    with pytest.raises(CancelledError):
        load(tmp_path, cancelled=cancelled)
    assert asked[0] == after + 1  # Nothing was begun after the first yes.
    assert modeling_qwen3_moe.Qwen3MoeExperts.__module__ == modeling_qwen3_moe.__name__
    assert load(tmp_path).store.ram_bytes > 0


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


NORM = "model.layers.1.input_layernorm.weight"


def test_a_missing_dense_tensor_is_named(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(NORM))
    with pytest.raises(ModelFilesError, match=NORM):
        load(tmp_path)


def test_a_dense_tensor_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({NORM: torch.ones(33)}))
    with pytest.raises(ModelFilesError, match="qwen3_moe"):
        load(tmp_path)
