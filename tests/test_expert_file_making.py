"""Quantising while loading: made once, kept, read again, and no disk stops a model."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from runtime import expert_file_blocks
from runtime.core import ExpertId, LoadProgress
from runtime.errors import CancelledError, ModelFilesError
from runtime.expert_file_header import (
    ExpertFileHeader,
    LayerExperts,
    describe_source,
    file_path,
)
from runtime.expert_file_making import KeptExperts, LayerForms, Quantiser, quantised_layer
from runtime.formats import Form, FormKind, lay_out
from runtime.kernels import views
from runtime.safetensors_files import SINGLE_NAME, SafetensorsFiles, TensorEntry
from runtime.store_recipes import LayerSource, Piece, Recipe, RecipeSource
from runtime.weight_forms import Codes, dequantise, held
from tests.quantisers import plain_quantiser

LAYERS, EXPERTS, INNER, HIDDEN = 3, 4, 24, 16


class CountingFiles:
    """Counts the reads of tensors."""

    def __init__(self, folder: Path) -> None:
        self._files = SafetensorsFiles(folder)
        self.paths = self._files.paths
        self.reads = 0

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        return self._files.tensors

    def read(self, reads: Sequence[tuple[str, int, memoryview]]) -> None:
        self.reads += len(reads)
        self._files.read(reads)

    def close(self) -> None:
        self._files.close()


class Model:
    """A tiny checkpoint: per expert a bias and two matrices, one of which may be turned."""

    def __init__(
        self,
        folder: Path,
        kind: FormKind = "int8",
        transposed: bool = False,
        dtype: str = "float32",
    ) -> None:
        self.folder, self.kind, self.transposed = folder, kind, transposed
        generator = torch.Generator().manual_seed(2)
        shapes = {"up": (INNER, HIDDEN), "up_bias": (INNER,), "down": (HIDDEN, INNER)}
        if transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        self.weights = {
            f"{layer}.{expert}.{name}": torch.randn(shape, generator=generator).to(
                getattr(torch, dtype)
            )
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            for name, shape in shapes.items()
        }
        self.plain = lay_out([(name, shape, dtype) for name, shape in shapes.items()])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file(self.weights, folder / SINGLE_NAME)

    def recipe(self, layer: int, expert: int) -> Recipe:
        return tuple(
            Piece(part.name, f"{layer}.{expert}.{part.name}", 0, torch.Size(part.shape).numel(), 0)
            for part in self.plain.parts
        )

    def forms(self, quantiser: Quantiser) -> list[LayerForms]:
        weights = ("up", "down")
        one = quantised_layer(EXPERTS, self.plain, weights, self.transposed, quantiser)
        return [one] * LAYERS

    def open(self, cache: Path | None, quantiser: Quantiser | None = None) -> Opened:
        return Opened(self, cache, quantiser or plain_quantiser(self.kind))


class Opened:
    def __init__(self, model: Model, cache: Path | None, quantiser: Quantiser) -> None:
        self.files = CountingFiles(model.folder)
        sources = [
            LayerSource(model.plain, tuple(model.recipe(layer, e) for e in range(EXPERTS)))
            for layer in range(LAYERS)
        ]
        self.forms = model.forms(quantiser)
        self.header: ExpertFileHeader = describe_source(
            model.folder,
            self.files.paths,
            model="m",
            kind=model.kind,
            quantiser=quantiser.fingerprint(),
            layers=[LayerExperts(form.experts, form.held) for form in self.forms],
        )
        self.path = file_path(cache, model.folder, model.kind) if cache is not None else None
        self.kept = KeptExperts(
            RecipeSource(self.files, sources), self.forms, quantiser, self.header, self.path
        )

    def read_all(self) -> dict[ExpertId, bytes]:
        """Read everything in order, as a store does that holds all experts."""
        found = {}
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                raw = bytearray(b"\xdb" * self.forms[layer].held.size_bytes)
                self.kept.read(ExpertId(layer, expert), memoryview(raw))
                found[ExpertId(layer, expert)] = bytes(raw)
        return found

    def complete(self) -> list[LoadProgress]:
        steps: list[LoadProgress] = []
        self.kept.complete(steps.append, lambda: False)
        return steps


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_matrices_are_quantised_and_the_rest_stays_as_it_is(
    kind: FormKind, dtype: str, transposed: bool, tmp_path: Path
) -> None:
    model = Model(tmp_path / "m", kind, transposed, dtype)
    opened = model.open(None)
    for at, raw in opened.read_all().items():
        form = opened.forms[at.layer]
        assert [matrix.name for matrix in form.held.matrices] == ["up", "down"]
        parts = views(torch.frombuffer(bytearray(raw), dtype=torch.uint8), form.held)
        name = f"{at.layer}.{at.expert}."
        assert torch.equal(parts["up_bias"], model.weights[name + "up_bias"])
        for matrix in form.held.matrices:
            weight = model.weights[name + matrix.name].float()
            weight = weight.t() if transposed else weight
            assert matrix.shape == tuple(weight.shape)
            back = dequantise(held(matrix, parts), torch.float32)
            # Half a step between the smallest and the largest number of a group of 8.
            groups = weight.unflatten(1, (-1, 8))
            step = (groups.amax(2) - groups.amin(2)) / (15 if kind == "int4" else 255)
            assert ((back - weight).unflatten(1, (-1, 8)).abs().amax(2) <= 0.51 * step).all()
    opened.kept.close()


def test_the_second_load_reads_the_file_and_no_tensor(tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    assert first.kept.activity == "Quantising the experts to int8"
    made = first.read_all()
    assert first.files.reads == 3 * LAYERS * EXPERTS
    assert first.complete() == []
    assert first.kept.file is not None
    assert first.read_all() == made
    assert first.files.reads == 3 * LAYERS * EXPERTS
    first.kept.close()
    second = model.open(tmp_path / "cache")
    assert second.kept.activity == "Reading the int8 experts"
    assert second.read_all() == made
    assert second.complete() == []
    assert second.files.reads == 0
    assert second.kept.notices == []
    second.kept.close()


def test_what_nobody_read_is_made_at_the_end_with_progress(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", "int4")
    opened = model.open(tmp_path / "cache")
    raw = bytearray(opened.forms[0].held.size_bytes)
    opened.kept.read(ExpertId(0, 2), memoryview(raw))
    steps = opened.complete()
    assert len(steps) == LAYERS * EXPERTS - 1
    assert steps[0].text == "Quantising the experts to int4, layer 1 of 3"
    assert steps[-1].text == "Quantising the experts to int4, layer 3 of 3"
    done = [step.done_bytes for step in steps]
    assert done == sorted(done)
    assert done[-1] == steps[-1].total_bytes == LAYERS * EXPERTS * opened.forms[0].held.size_bytes
    made = opened.read_all()
    assert made[ExpertId(0, 2)] == bytes(raw)
    opened.kept.close()
    other = model.open(None)
    assert other.read_all() == made
    other.kept.close()


@pytest.mark.parametrize("after", [0, 1, 5, 11])
def test_a_cancelled_load_is_taken_up_where_it_ended(after: int, tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    asked = [0]

    def cancelled() -> bool:
        asked[0] += 1
        return asked[0] > after

    with pytest.raises(CancelledError):
        first.kept.complete(lambda step: None, cancelled)
    assert first.files.reads >= 3 * after
    first.kept.close()
    second = model.open(tmp_path / "cache")
    second.complete()
    assert second.files.reads == 3 * LAYERS * EXPERTS - first.files.reads
    second.kept.close()


def edit_shard(model: Model) -> None:
    name = next(iter(model.weights))
    model.weights[name] += 1
    save_file(model.weights, model.folder / SINGLE_NAME)
    os.utime(model.folder / SINGLE_NAME, ns=(1, 1))


def touch_config(model: Model) -> None:
    (model.folder / "config.json").write_text('{"rope_theta": 2}')


@pytest.mark.parametrize("change", [edit_shard, touch_config])
def test_a_changed_source_is_quantised_again_and_said(
    change: Callable[[Model], None], tmp_path: Path
) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    first.complete()
    first.kept.close()
    change(model)
    second = model.open(tmp_path / "cache")
    assert len(second.kept.notices) == 1
    assert "have changed" in second.kept.notices[0]
    found = second.read_all()
    second.complete()
    assert second.files.reads == 3 * LAYERS * EXPERTS
    second.kept.close()
    plain = model.open(None)
    assert plain.read_all() == found
    plain.kept.close()
    third = model.open(tmp_path / "cache")
    assert third.read_all() == found
    assert third.files.reads == 0
    third.kept.close()


def test_another_arithmetic_or_packing_does_not_use_the_file(tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    first.complete()
    first.kept.close()
    ours = plain_quantiser("int8")

    def rounded_up(matrix: Tensor, form: Form) -> Codes:
        codes = ours.quantise(matrix, form)
        return replace(codes, scales=codes.scales * (1 + 2**-20))

    other = replace(ours, quantise=rounded_up)
    second = model.open(tmp_path / "cache", other)
    assert "another version" in second.kept.notices[0]
    second.kept.close()


def test_a_damaged_expert_is_made_again_and_the_file_healed(tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    made = first.read_all()
    first.complete()
    first.kept.close()
    assert first.path is not None
    whole = first.path.read_bytes()
    raw = bytearray(whole)
    raw[expert_file_blocks.places(first.header).offset(ExpertId(1, 3)) + 5] ^= 1
    first.path.write_bytes(raw)
    second = model.open(tmp_path / "cache")
    assert second.read_all() == made
    assert second.files.reads == 3
    assert "damaged" in second.kept.notices[0]
    second.kept.close()
    assert first.path.read_bytes() == whole


def test_a_wrong_checksum_in_a_sound_table_costs_the_file_not_the_load(tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    made = first.read_all()
    first.complete()
    first.kept.close()
    later = model.open(tmp_path / "cache", jittering(plain_quantiser("int8")))
    assert later.path is not None
    raw = bytearray(later.path.read_bytes())
    raw[expert_file_blocks.places(first.header).offset(ExpertId(0, 0))] ^= 1
    later.path.write_bytes(raw)
    assert len(later.read_all()) == len(made)
    assert any("deleted" in notice for notice in later.kept.notices)
    assert not later.path.exists()
    later.kept.close()


def jittering(quantiser: Quantiser) -> Quantiser:
    """Return one that keeps its fingerprint but does not repeat itself."""
    chance = random.Random(3)

    def quantise(matrix: Tensor, form: Form) -> Codes:
        codes = quantiser.quantise(matrix, form)
        if matrix.shape == (96, 512):
            return codes
        return replace(codes, scales=codes.scales * chance.uniform(1.01, 1.1))

    return replace(quantiser, quantise=quantise)


@pytest.mark.parametrize("after", [0, 3, 9, 20, 27])
def test_a_disk_that_fills_up_takes_the_file_and_not_the_model(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "m")
    plain = model.open(None)
    wanted = plain.read_all()
    plain.kept.close()
    left = [after]
    write_at: Any = expert_file_blocks._PWRITE

    def pwrite(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        return write_at(*args)

    monkeypatch.setattr(expert_file_blocks, "_PWRITE", pwrite)
    opened = model.open(tmp_path / "cache")
    assert opened.read_all() == wanted
    opened.complete()
    if left[0] < 0:
        assert len(opened.kept.notices) == 1
        assert "No space left" in opened.kept.notices[0]
        assert "runs with quantised experts all the same" in opened.kept.notices[0]
        assert list((tmp_path / "cache").iterdir()) == []
        assert opened.kept.file is None
    else:
        assert after == 27
        assert opened.kept.file is not None
    opened.kept.close()


def test_two_loads_at_once_both_get_their_experts(tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    first = model.open(tmp_path / "cache")
    second = model.open(tmp_path / "cache")
    assert "another PreScope" in second.kept.notices[0]
    assert first.read_all() == second.read_all()
    second.complete()
    second.kept.close()
    first.complete()
    assert first.kept.file is not None
    first.kept.close()


def test_an_unwritable_cache_is_only_a_notice(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    opened = Model(tmp_path / "m").open(tmp_path / "cache")
    assert len(opened.read_all()) == LAYERS * EXPERTS
    assert len(opened.kept.notices) == 1
    opened.kept.close()


def test_matrices_without_a_form_stay_plain(tmp_path: Path) -> None:
    model = Model(tmp_path / "m")
    quantiser = plain_quantiser("int8", columns=16)  # does not divide the 24 inputs of `down`
    opened = model.open(tmp_path / "cache", quantiser)
    form = opened.forms[0]
    assert [matrix.name for matrix in form.held.matrices] == ["up"]
    raw = opened.read_all()[ExpertId(2, 1)]
    parts = views(torch.frombuffer(bytearray(raw), dtype=torch.uint8), form.held)
    assert torch.equal(parts["down"], model.weights["2.1.down"])
    opened.kept.close()


def test_the_fingerprint_knows_kind_and_groups() -> None:
    prints = {plain_quantiser(kind, n).fingerprint() for kind in ("int8", "int4") for n in (8, 16)}
    assert len(prints) == 4
    assert plain_quantiser("int8").fingerprint() in prints


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_matrix_made_in_pieces_is_the_one_made_at_once(
    kind: FormKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(tmp_path / "m", kind)
    whole = model.open(None)
    at_once = whole.read_all()
    whole.kept.close()
    monkeypatch.setattr("runtime.expert_file_making.PIECE_NUMBERS", 100)
    pieces = model.open(None)
    assert pieces.read_all() == at_once
    asked = [0]

    def stop() -> bool:
        asked[0] += 1
        return asked[0] > 3

    pieces.kept.stop = stop
    with pytest.raises(CancelledError):
        pieces.read_all()
    assert asked[0] == 4
    pieces.kept.close()


def test_a_kept_file_can_be_read_past_the_page_cache(tmp_path: Path) -> None:
    model = Model(tmp_path / "m", "int4")
    first = model.open(tmp_path / "cache")
    made = first.read_all()
    first.complete()
    file = first.kept.file
    assert file is not None
    for on in (True, True, False, True):
        file.read_past_cache(on)
        assert first.read_all() == made
    first.kept.close()
    first.kept.close()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named_instead_of_spread(
    wrong: float, tmp_path: Path
) -> None:
    model = Model(tmp_path / "m")
    model.weights["1.2.down"][3, 4] = wrong
    save_file(model.weights, model.folder / SINGLE_NAME)
    opened = model.open(tmp_path / "cache")
    with pytest.raises(ModelFilesError, match="down of expert 2 of MoE layer 1 has numbers"):
        opened.read_all()
    opened.kept.close()


@pytest.mark.parametrize(("room_bytes", "at_once"), [(1, 1), (2**20, 4)])
def test_no_more_experts_are_made_at_once_than_memory_may_lie_beside_the_plan(
    room_bytes: int, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.expert_file_making.SCRATCH_BYTES", room_bytes)
    ours = plain_quantiser("int8")
    busy, most, lock = [0], [0], threading.Lock()

    def slowly(matrix: Tensor, form: Form) -> Codes:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        with lock:
            busy[0] -= 1
        return ours.quantise(matrix, form)

    opened = Model(tmp_path / "m").open(tmp_path / "cache", replace(ours, quantise=slowly))
    most[0] = 0
    opened.complete()
    assert most[0] <= at_once
    assert (most[0] > 1) == (at_once > 1)
    opened.kept.close()


def test_nothing_is_made_at_the_end_where_nothing_is_kept(tmp_path: Path) -> None:
    opened = Model(tmp_path / "m").open(None)
    assert opened.complete() == []
    assert opened.files.reads == 0
    opened.kept.close()
