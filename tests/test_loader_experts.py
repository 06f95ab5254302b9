"""Whole models with quantised experts: bit for bit the same twice, and near the unquantised."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import expert_file_blocks
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import ExpertId, ExpertsWish, LoadProgress
from runtime.errors import CancelledError
from runtime.expert_file_header import FOLDER, kept_files
from runtime.formats import lay_out
from runtime.kernels import views
from runtime.loader import LoadedModel, read_shape
from runtime.loader_experts import hold_experts
from runtime.safetensors_files import SafetensorsFiles
from runtime.store_recipes import LayerSource
from runtime.weight_forms import dequantise, held
from tests.checkpoints import attach_plain_runner, load, logits
from tests.families import make_checkpoint

CASES: list[tuple[str, ExpertsWish]] = [
    ("qwen3_moe", "int4"),
    ("gpt_oss", "int8"),
    ("gpt_oss", "int4"),
]


def run(loaded: LoadedModel) -> Tensor:
    attach_plain_runner(loaded.layers, loaded.store)
    found = torch.cat([step.flatten() for step in logits(loaded.model)])
    loaded.store.close()
    return found


def far(found: Tensor, reference: Tensor) -> float:
    """Return the root mean square of the difference, as a share of the spread of the reference."""
    return float((found - reference).square().mean().sqrt() / reference.std())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read, one entry per read."""
    names: list[str] = []
    plain = SafetensorsFiles.read

    def counting(files: Any, wanted: Any) -> None:
        names.extend(name for name, _, _ in wanted)
        plain(files, wanted)

    monkeypatch.setattr(SafetensorsFiles, "read", counting)
    return names


def experts_among(names: list[str]) -> list[str]:
    return [name for name in names if ".experts." in name and "router" not in name]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_the_second_load_is_the_first_to_the_last_bit_and_reads_no_expert(
    family: str, kind: ExpertsWish, tmp_path: Path, reads: list[str]
) -> None:
    model, kept = tmp_path / "model", tmp_path / "kept"
    make_checkpoint(family, model)
    stored = run(load(model))
    assert experts_among(reads)
    reads.clear()
    first = load(model, experts=kind, kept=kept)
    assert experts_among(reads)
    assert [file.finished for file in kept_files(kept)] == [True]
    made = run(first)
    reads.clear()
    second = load(model, experts=kind, kept=kept)
    assert experts_among(reads) == []
    assert reads, "the dense weights come from the checkpoint"
    assert second.remarks == ()
    assert torch.equal(run(second), made)
    assert not torch.equal(made, stored)
    # Bounds of these tiny random models, twice what was seen: they say that nothing is mixed up.
    assert far(made, stored) < {"int8": 0.011, "int4": 0.15}[kind]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_weight_is_within_a_step_of_the_stored_one(
    family: str, kind: ExpertsWish, tmp_path: Path
) -> None:
    make_checkpoint(family, tmp_path)
    stored, quantised = load(tmp_path), load(tmp_path, experts=kind)
    for layer, (plain, now) in enumerate(zip(stored.layers, quantised.layers, strict=True)):
        assert now.math.up in {matrix.name for matrix in now.format.matrices}
        # Inputs that no group of four bits divides take eight.
        assert {matrix.form.kind for matrix in now.format.matrices} <= {kind, "int8"}
        for expert in range(plain.experts):
            at = ExpertId(layer, expert)
            before = views(stored.store.bytes_of(at), plain.format)
            after = views(quantised.store.bytes_of(at), now.format)
            for matrix in now.format.matrices:
                weight = before[matrix.name]
                weight = weight.t() if plain.math.transposed else weight
                back = dequantise(held(matrix, after), torch.float32)
                reach = weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)
                assert ((back - weight).abs() <= reach / (15 if kind == "int4" else 120)).all()
            for name in before.keys() & after.keys() - {m.name for m in now.format.matrices}:
                assert torch.equal(before[name], after[name])
    stored.store.close()
    quantised.store.close()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_plan_knows_the_quantised_sizes_before_the_load(
    kind: ExpertsWish, tmp_path: Path
) -> None:
    make_checkpoint("qwen3_moe", tmp_path, "bfloat16")
    plain, shape = read_shape(tmp_path), read_shape(tmp_path, None, kind)
    loaded = load(tmp_path, experts=kind)
    assert shape == loaded.shape
    assert shape.expert_bytes == loaded.store.slot_bytes < plain.expert_bytes
    assert shape.dense_bytes == plain.dense_bytes
    loaded.store.close()


def test_progress_tells_what_happens_in_bytes(tmp_path: Path) -> None:
    make_checkpoint("mixtral", tmp_path / "model")
    steps: list[LoadProgress] = []
    options: dict[str, Any] = {"experts": "int4", "kept": tmp_path / "kept"}
    load(tmp_path / "model", progress=steps.append, **options).store.close()
    assert any(s.text == "Quantising the experts to int4, layer 1 of 2" for s in steps)
    assert not any("Reading the experts" in s.text for s in steps)
    done = [step.done_bytes for step in steps]
    assert done == sorted(done)
    assert steps[-1].done_bytes == steps[-1].total_bytes
    steps.clear()
    load(tmp_path / "model", progress=steps.append, **options).store.close()
    assert any(s.text == "Reading the int4 experts, layer 1 of 2" for s in steps)
    assert not any("Quantising" in s.text for s in steps)


def test_a_load_that_is_cancelled_while_quantising_goes_on_the_next_time(
    tmp_path: Path, reads: list[str]
) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "model")
    kept = tmp_path / "kept"
    begun = [False]

    def progress(step: LoadProgress) -> None:
        begun[0] |= "layer 2 of" in step.text

    with pytest.raises(CancelledError):
        load(
            tmp_path / "model",
            experts="int8",
            kept=kept,
            progress=progress,
            cancelled=lambda: begun[0],
        )
    assert [file.finished for file in kept_files(kept)] == [False]
    first = len(experts_among(reads))
    assert first
    reads.clear()
    resumed = load(tmp_path / "model", experts="int8", kept=kept)
    again = len(experts_among(reads))
    reads.clear()
    whole = load(tmp_path / "model", experts="int8")
    assert again < len(experts_among(reads))
    assert torch.equal(run(resumed), run(whole))
    assert [file.finished for file in kept_files(kept)] == [True]


def test_a_full_disk_still_loads_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "model")
    wanted = run(load(tmp_path / "model", experts="int8"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("U", (), {"free": 1000}))
    loaded = load(tmp_path / "model", experts="int8", kept=tmp_path / "kept")
    assert len(loaded.remarks) == 1
    assert "are free" in loaded.remarks[0]
    assert list((tmp_path / "kept").iterdir()) == []
    assert torch.equal(run(loaded), wanted)


def test_a_disk_that_breaks_mid_load_still_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "model")
    wanted = run(load(tmp_path / "model", experts="int4"))
    write_at: Any = expert_file_blocks._PWRITE
    left = [8]

    def pwrite(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        return write_at(*args)

    monkeypatch.setattr(expert_file_blocks, "_PWRITE", pwrite)
    loaded = load(tmp_path / "model", experts="int4", kept=tmp_path / "kept")
    assert "Input/output error" in loaded.remarks[0]
    assert kept_files(tmp_path / "kept") == []
    assert torch.equal(run(loaded), wanted)


def test_what_is_quantised_already_stays_with_a_remark(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    quantised = load(tmp_path, experts="int8")
    sources = [LayerSource(layer.format, ((),) * layer.experts) for layer in quantised.layers]
    asked = hold_experts(quantised.layers, sources, "int4")
    assert asked.sources == tuple(sources)
    assert asked.quantiser is None
    assert "quantised already (int8)" in asked.remarks[0]
    quantised.store.close()


def test_experts_that_fit_no_group_stay_with_a_remark(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path)
    loaded = load(tmp_path)
    odd = lay_out([("gate_up_proj", (6, 7), "float32"), ("down_proj", (7, 3), "float32")])
    sources = [LayerSource(odd, ((),) * layer.experts) for layer in loaded.layers]
    asked = hold_experts(loaded.layers, sources, "int4")
    assert asked.quantiser is None
    assert "no matrix fits" in asked.remarks[0]
    loaded.store.close()


def test_the_default_model_is_kept_under_its_own_name(tmp_path: Path) -> None:
    loaded = load(DEFAULT_MODEL_DIR, experts="int4", kept=tmp_path / FOLDER)
    loaded.store.close()
    (file,) = kept_files(tmp_path / FOLDER)
    assert (file.model, file.kind, file.finished) == ("PreScope Tiny", "int4", True)


def test_a_copied_model_has_a_file_of_its_own(tmp_path: Path) -> None:
    make_checkpoint("qwen3_moe", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        load(tmp_path / name, experts="int8", kept=tmp_path / "kept").store.close()
    assert [file.model for file in kept_files(tmp_path / "kept")] == ["a", "b"]
