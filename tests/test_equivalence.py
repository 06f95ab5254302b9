"""The promise that matters most: a plan changes when and where, never what.

Every path through the executor, against transformers' own `eager` experts, to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.core import POLICIES, PolicyName
from runtime.device import Device
from runtime.device_emulated import EmulatedDevice
from runtime.device_host import HostDevice
from runtime.errors import TransferError
from runtime.executor import BEFORE_LAYERS, Executor
from runtime.kernels import ExpertMath
from runtime.link import chunk_bytes_for
from runtime.loader import LoadedModel, load_model
from runtime.policy import PolicySetup
from runtime.policy_table import make_policy
from runtime.scheduler import Costs
from runtime.simulate import simulate
from runtime.trace import ForwardPass, LayerStep
from tests.families import FAMILIES, make_checkpoint
from tests.machines import emulated_profile

PROMPT = torch.randint(3, 90, (2, 13), generator=torch.Generator().manual_seed(3))
NEXT = torch.randint(3, 90, (2, 1), generator=torch.Generator().manual_seed(4))
PROFILE = emulated_profile()
CARD_POLICIES = [policy for policy in POLICIES if policy != "cpu-only"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny random checkpoints, each written once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder


def load(folder: Path) -> LoadedModel:
    return load_model(
        folder,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda progress: None,
        cancelled=lambda: False,
    )


@contextmanager
def executing(
    loaded: LoadedModel,
    policy: PolicyName,
    slots: int,
    device: Device | None = None,
    observe: Any = None,
) -> Iterator[Executor]:
    chosen = device or EmulatedDevice(PROFILE, virtual_clock=True)
    executor = Executor(
        chosen,
        loaded.layers,
        loaded.store,
        PROFILE,
        slots,
        policy,
        virtual_clock=True,
        observe=observe,
    )
    attach(loaded.layers, executor.run)
    try:
        yield executor
    finally:
        executor.close()


def logits_of(
    model: Any, executor: Executor | None = None, device: Device | None = None
) -> list[torch.Tensor]:
    """Logits of a prefill and of one cached decode step, each waited for on `device`."""
    with torch.inference_mode():
        if executor is not None:
            executor.begin_pass(PROMPT.numel(), span=PROMPT.shape[1])
        first = model(input_ids=PROMPT, use_cache=True)
        if device is not None:
            device.wait_for_compute()
        if executor is not None:
            executor.begin_pass(NEXT.numel())
        second = model(input_ids=NEXT, past_key_values=first.past_key_values, use_cache=True)
        if device is not None:
            device.wait_for_compute()
    return [first.logits, second.logits]


def stock(folder: Path) -> Any:
    """The reference: transformers' own experts, from weights at the alignment torch allocates.

    Stock weights are views into the mapped file at any multiple of 8 bytes, and matrix products
    round differently there: that would compare allocators.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    for weight in (*model.parameters(), *model.buffers()):
        weight.data = weight.data.clone()
    return model


def assert_bitwise(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.isfinite(reference).all()
        assert reference.std() > 1e-3, "degenerate logits prove nothing"
        difference = (mine - reference).abs().max().item()
        assert torch.equal(mine, reference), f"largest difference {difference:.2e}"


@pytest.mark.families
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_bitwise_equal_to_eager(family: str, checkpoints: Any) -> None:
    folder = checkpoints(family)
    theirs = logits_of(stock(folder))
    loaded = load(folder)
    smallest = loaded.shape.top_k
    for policy, slots in (("hybrid", smallest), ("on-demand", loaded.shape.expert_count // 4 + 1)):
        with executing(loaded, policy, slots) as executor:  # type: ignore[arg-type]
            assert_bitwise(logits_of(loaded.model, executor), theirs)
            counters = executor.counters()
            assert counters.routed == sum(counters.served) > 0
            assert counters.link_bytes_issued > 0


@pytest.mark.parametrize("slots", [1, 3, 8, 16])
@pytest.mark.parametrize("policy", CARD_POLICIES)
def test_every_policy_and_cache_size_is_bitwise_equal(
    policy: PolicyName, slots: int, checkpoints: Any
) -> None:
    folder = checkpoints("qwen3_moe")
    theirs = logits_of(stock(folder))
    loaded = load(folder)
    with executing(loaded, policy, slots) as executor:
        assert_bitwise(logits_of(loaded.model, executor), theirs)
        assert executor.slots_used <= slots


def test_experts_computed_in_place_are_bitwise_equal(checkpoints: Any) -> None:
    folder = checkpoints("qwen3_moe")
    loaded = load(folder)
    with executing(loaded, "cpu-only", 0, HostDevice()) as executor:
        assert_bitwise(logits_of(loaded.model, executor), logits_of(stock(folder)))
        assert executor.counters().served_cpu == executor.counters().routed


class FailingDevice(EmulatedDevice):
    """An emulated card that refuses every third copy."""

    copies = 0

    def copy(self, *args: Any) -> Any:
        self.copies += 1
        if self.copies % 3 == 0:
            raise TransferError("a planted failure")
        return super().copy(*args)


def test_failing_copies_are_counted_and_change_nothing(checkpoints: Any) -> None:
    folder = checkpoints("mixtral")
    loaded = load(folder)
    device = FailingDevice(PROFILE, virtual_clock=True)
    with executing(loaded, "on-demand", 3, device) as executor:
        assert_bitwise(logits_of(loaded.model, executor), logits_of(stock(folder)))
        counters = executor.counters()
        assert counters.copies_failed > 0
        assert counters.link_bytes_failed > 0
        assert counters.routed == sum(counters.served)


def test_shrinking_and_growing_between_passes_changes_nothing(checkpoints: Any) -> None:
    folder = checkpoints("qwen3_moe")
    theirs = logits_of(stock(folder))
    loaded = load(folder)
    with executing(loaded, "on-demand", 12) as executor:
        for slots in (12, 2, 7, 1, 12):
            executor.resize(slots)
            assert_bitwise(logits_of(loaded.model, executor), theirs)
            assert executor.slots_used <= slots


def test_the_comparison_notices_a_wrong_order_of_additions(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("qwen3_moe")
    theirs = logits_of(stock(folder))
    loaded = load(folder)
    import runtime.layer_rows as layer_rows

    def hits_first(rows: torch.Tensor, index: torch.Tensor, dtype: Any) -> torch.Tensor:
        tokens, k = index.shape
        return rows.view(tokens, k, -1).flip(1).sum(1).to(dtype)

    monkeypatch.setattr(layer_rows, "combine", hits_first)
    with executing(loaded, "on-demand", 4) as executor, pytest.raises(AssertionError, match="larg"):
        assert_bitwise(logits_of(loaded.model, executor), theirs)


def test_the_comparison_notices_an_expert_computed_with_anothers_bytes(
    checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoints("qwen3_moe")
    theirs = logits_of(stock(folder))
    loaded = load(folder)
    rows = ExpertMath.rows

    def swapped(self: ExpertMath, parts: Mapping[str, Any], x: Any, weights: Any) -> Any:
        return rows(self, {**parts, self.down: parts[self.down].flip(0)}, x, weights)

    monkeypatch.setattr(ExpertMath, "rows", swapped)
    with executing(loaded, "on-demand", 4) as executor, pytest.raises(AssertionError, match="larg"):
        assert_bitwise(logits_of(loaded.model, executor), theirs)


@pytest.mark.parametrize("slots", [2, 5, 11])
@pytest.mark.parametrize("policy", CARD_POLICIES)
def test_engine_and_simulator_count_the_same_on_one_trace(
    policy: PolicyName, slots: int, checkpoints: Any
) -> None:
    """Counters, bytes by cause and every modelled second, from the recorded routing alone."""
    loaded = load(checkpoints("qwen3_moe"))
    trace: list[list[LayerStep]] = []
    tokens = [PROMPT.numel(), NEXT.numel()] * 3
    spans = [PROMPT.shape[1], 1] * 3

    def observe(layer: int, step: LayerStep) -> None:
        if layer == BEFORE_LAYERS:
            trace.append([])
        else:
            trace[-1].append(step)

    device = EmulatedDevice(PROFILE, virtual_clock=True)
    with executing(loaded, policy, slots, device, observe) as executor:
        for _ in range(3):
            logits_of(loaded.model, executor, device)
        engine, engine_s = executor.counters(), device.now_s()
        stalls = tuple(executor.residency.stall_s_by_layer)
    passes = [
        ForwardPass(count, tuple(layers), span=span)
        for count, span, layers in zip(tokens, spans, trace, strict=True)
    ]
    layer_bytes = tuple(layer.format.size_bytes for layer in loaded.layers)
    chunk_bytes = chunk_bytes_for(PROFILE.link_bytes_per_s.value)
    experts = tuple(layer.experts for layer in loaded.layers)
    setup = PolicySetup(experts, loaded.layers[0].top_k, layer_bytes, slots, Costs.of(PROFILE))
    fresh = make_policy(policy, setup)
    simulated = simulate(passes, PROFILE, fresh, slots, layer_bytes, chunk_bytes)
    assert simulated.counters == replace(engine, predictor_s=0.0)
    assert simulated.total_s == engine_s
    assert simulated.stall_s_by_layer == stalls
