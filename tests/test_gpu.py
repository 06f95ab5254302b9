"""The executor on a real card: the same promises as on the emulated one, in one run.

Every body that makes sense without a card also runs over the emulated card and over the card's own
code with streams that only log.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.core import ExpertId
from runtime.device import Stream
from runtime.executor_preload import preload
from runtime.loader import LoadedModel
from tests.cards import (
    CARDS,
    Card,
    answer,
    assert_agree,
    failing_every_third_copy,
)
from tests.checkpoints import attach_plain_runner, load
from tests.families import make_checkpoint
from tests.test_equivalence import stock
from tests.test_quantised_equivalence import HELD, held

POLICIES = ("on-demand", "cpu-miss", "hybrid", "prescope")
A_TENTH_OF_A_SECOND_CYCLES = 200_000_000
"""More than a tenth on a slow card, less on a fast one."""


def on_card(*values: Iterable[Any]) -> list[Any]:
    """Every combination of parameters, for the real card."""
    return [pytest.param("cuda", *each, marks=pytest.mark.gpu) for each in product(*values)]


@pytest.fixture(params=CARDS)
def card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(request.param, monkeypatch)


def loaded_on(card: Card, folder: Path, device: Any, dtype: torch.dtype) -> LoadedModel:
    return load(
        folder,
        torch_device=card.where,
        dtype=dtype,
        allocate_host=device.allocate_host,
        release_host=device.release_host,
    )


@pytest.mark.parametrize(
    ("card", "family", "slots"),
    [
        ("emulated", "qwen3_moe", 6),
        ("stand-in", "qwen3_moe", 3),
        ("stand-in", "gpt_oss", 6),
        ("stand-in", "mixtral", 16),
        *on_card(["qwen3_moe", "gpt_oss", "mixtral"], [3, 6, 16]),
    ],
    indirect=["card"],
)
def test_every_policy_and_cache_size_agrees_with_eager(
    family: str, slots: int, card: Card, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path)
    theirs = answer(stock(folder).to(card.where))
    for policy in POLICIES:
        device = card.open()
        loaded = loaded_on(card, folder, device, torch.float32)
        with card.executing(loaded, device, policy, slots) as executor:
            ours = answer(loaded.model, executor)
            assert_agree(card, ours, theirs, executor.counters())
        loaded.store.close()


@pytest.mark.parametrize(
    ("card", "family", "name", "policy"),
    [
        *(("stand-in", "qwen3_moe", name, "hybrid") for name in HELD),
        ("emulated", "gpt_oss", "mxfp4", "hybrid"),
        *on_card(["qwen3_moe", "gpt_oss"], HELD, ["on-demand", "hybrid"]),
    ],
    indirect=["card"],
)
def test_quantised_experts_are_those_of_the_dequantised_reference(
    family: str, name: str, policy: str, card: Card, tmp_path: Path
) -> None:
    folder = make_checkpoint(family, tmp_path)
    device = card.open()
    loaded = loaded_on(card, folder, device, torch.float32)
    with held(loaded, HELD[name], allocate_host=device.allocate_host) as store:
        layers = [replace(layer, format=store.format_of(layer.index)) for layer in loaded.layers]
        attach_plain_runner(tuple(layers), store)
        theirs = answer(loaded.model)
        options = {"layers": layers, "store": store}
        with card.executing(loaded, device, policy, 5, **options) as executor:
            assert_agree(card, answer(loaded.model, executor), theirs, executor.counters())
    loaded.store.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", HELD)
def test_in_bfloat16_as_well(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    card = Card("cuda", monkeypatch)
    folder = make_checkpoint("qwen3_moe", tmp_path, "bfloat16")
    device = card.open()
    loaded = loaded_on(card, folder, device, torch.bfloat16)
    with held(loaded, HELD[name], allocate_host=device.allocate_host) as store:
        layers = [replace(layer, format=store.format_of(layer.index)) for layer in loaded.layers]
        attach_plain_runner(tuple(layers), store)
        theirs = answer(loaded.model)
        options = {"layers": layers, "store": store}
        with card.executing(loaded, device, "on-demand", 5, **options) as executor:
            assert_agree(card, answer(loaded.model, executor), theirs, executor.counters())
    loaded.store.close()


@pytest.mark.parametrize("policy", ["on-demand", "hybrid"])
def test_memory_that_cannot_be_pinned_goes_by_staging_buffers(
    policy: str, card: Card, tmp_path: Path
) -> None:
    folder = make_checkpoint("qwen3_moe", tmp_path)
    theirs = answer(stock(folder).to(card.where))
    device = card.open(pinned=False)
    staged: list[int] = []
    stage = device.stage

    def noted(buffer: int, target: torch.Tensor, source: torch.Tensor) -> None:
        staged.append(source.numel())
        stage(buffer, target, source)

    device.stage = noted  # type: ignore[method-assign]
    loaded = loaded_on(card, folder, device, torch.float32)
    with card.executing(loaded, device, policy, 4) as executor:
        assert_agree(card, answer(loaded.model, executor), theirs, executor.counters())
        assert sum(staged) == executor.counters().link_bytes_issued > 0
    loaded.store.close()


def test_slots_given_up_between_tokens_change_nothing(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.executor_slots.LEAST_BLOCK_BYTES", 1)
    folder = make_checkpoint("qwen3_moe", tmp_path)
    theirs = answer(stock(folder).to(card.where))
    device = card.open()
    loaded = loaded_on(card, folder, device, torch.float32)
    with card.executing(loaded, device, "on-demand", 14) as executor:
        had: list[int] = []

        def shrink() -> None:
            had.append(executor.slots)
            if executor.shrink():
                assert executor.slots < had[-1]

        ours = answer(loaded.model, executor, between=shrink)
        assert executor.slots < had[0] == 14
        assert executor.slots_used <= executor.slots
        assert_agree(card, ours, theirs, executor.counters())
    loaded.store.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_copies_that_fail_change_nothing(policy: str, card: Card, tmp_path: Path) -> None:
    folder = make_checkpoint("mixtral", tmp_path)
    theirs = answer(stock(folder).to(card.where))
    device = card.open()
    failing_every_third_copy(device)
    loaded = loaded_on(card, folder, device, torch.float32)
    with card.executing(loaded, device, policy, 3) as executor:
        assert_agree(card, answer(loaded.model, executor), theirs, executor.counters())
        if policy == "on-demand":
            assert executor.counters().copies_failed > 0
    loaded.store.close()


def slowly(device: Any) -> None:
    """Let every expert on the card take a tenth of a second more."""
    launch = device.launch

    def slow(slot: int, size_bytes: int, tokens: int, compute: Callable[[], None]) -> None:
        def work() -> None:
            torch.cuda._sleep(A_TENTH_OF_A_SECOND_CYCLES)
            compute()

        launch(slot, size_bytes, tokens, work)

    device.launch = slow


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 13])
def test_the_cpu_is_done_while_the_card_still_computes_hits(
    tokens: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    card = Card("cuda", monkeypatch)
    device = card.open()
    loaded = loaded_on(card, make_checkpoint("qwen3_moe", tmp_path), device, torch.float32)
    with card.executing(loaded, device, "cpu-miss", 9) as executor:
        preload(
            executor,
            executor.residency.cache,
            [ExpertId(layer, number) for number in range(4) for layer in range(2)],
            [layer.format.size_bytes for layer in loaded.layers],
            lambda: False,
        )
        slowly(device)
        launched = 0
        computing_still: list[bool] = []
        launch, to_device, begin_layer = device.launch, device.to_device, device.begin_layer

        def noted_layer(*args: Any) -> None:
            nonlocal launched
            launched = 0
            begin_layer(*args)

        def noted_launch(*args: Any) -> None:
            nonlocal launched
            launched += 1
            launch(*args)

        def noted_return(rows: Any) -> Any:  # the CPU has computed all of them
            if launched:
                computing_still.append(not device.record(Stream.COMPUTE).event.query())  # type: ignore[attr-defined]
            return to_device(rows)

        device.begin_layer = noted_layer  # type: ignore[method-assign]
        device.launch, device.to_device = noted_launch, noted_return  # type: ignore[method-assign]
        for first in range(3, 9):
            ids = torch.arange(first, first + tokens, device=card.where)[None]
            with torch.inference_mode(), executor.computing():
                executor.begin_pass(tokens, span=tokens)
                loaded.model(input_ids=ids)
                device.wait_for_compute()
    loaded.store.close()
    assert computing_still, "no layer had work for both"
    assert all(computing_still)


@pytest.mark.gpu
def test_the_card_tells_when_it_had_nothing_left_to_compute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device: Any = Card("cuda", monkeypatch).open()
    with device.computing():
        torch.cuda._sleep(1000)
        device.to_host([torch.ones(1, 8, device=device.torch_device)])
        began_s = device.now_s()
        idle_s = device.watch_compute()
        device.wait_for_compute()
        assert idle_s() - began_s < 0.01
        torch.cuda._sleep(A_TENTH_OF_A_SECOND_CYCLES)
        done_s = device.watch_compute()
        assert done_s() == pytest.approx(device.now_s(), abs=0.01), "it computes"
        device.wait_for_compute()
        ended_s = device.now_s()
        assert ended_s - began_s > 0.02
        assert done_s() == pytest.approx(ended_s, abs=0.005)
    device.close()
