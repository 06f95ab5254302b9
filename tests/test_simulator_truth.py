"""Engine and simulator on the default model's own routing, predictions included: one truth.

The engine runs on the emulated machine under a virtual clock and writes down what it routed and
guessed; the simulator replays that. Counters, bytes by cause, seconds and stalls must be the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.adapter_routers import survey_routers
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import POLICIES
from runtime.device_emulated import EmulatedDevice
from runtime.executor import BEFORE_LAYERS, Executor
from runtime.link import chunk_bytes_for
from runtime.loader import LoadedModel, load_model
from runtime.policy import PolicySetup
from runtime.policy_table import make_policy
from runtime.predictor_open import LearningPredictor
from runtime.scheduler import Costs
from runtime.simulate import simulate
from runtime.telemetry import Counters
from runtime.trace import ForwardPass, LayerStep
from tests.machines import emulated_profile

PROFILE = emulated_profile(link_bytes_per_s=50e6, cpu_bytes_per_s=110e6, host_layer_s=8e-4)
PROMPT_TOKENS, NEW_TOKENS = 40, 30


def open_model(ram_experts: int | None) -> LoadedModel:
    return load_model(
        DEFAULT_MODEL_DIR,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda progress: None,
        cancelled=lambda: False,
        ram_experts=ram_experts,
    )


@pytest.fixture(scope="module")
def loaded() -> Iterator[LoadedModel]:
    model = open_model(None)
    yield model
    model.store.close()


class Notes:
    """What an executor tells its observer, as passes."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.first: list[LayerStep] = []
        self.layers: list[list[LayerStep]] = []

    def __call__(self, layer: int, step: LayerStep) -> None:
        if layer == BEFORE_LAYERS:
            self.first.append(step)
            self.layers.append([])
        else:
            self.layers[-1].append(step)

    def passes(self) -> list[ForwardPass]:
        noted = zip(self.shapes, self.layers, self.first, strict=True)
        return [
            ForwardPass(tokens, tuple(layers), first.predictions, span)
            for (tokens, span), layers, first in noted
        ]


def generate(
    loaded: LoadedModel, executor: Executor, device: Any, notes: Notes, new_tokens: int
) -> None:
    """A prompt and greedy tokens after it."""
    ids = torch.arange(10, 10 + PROMPT_TOKENS)[None]
    past = None
    with torch.inference_mode():
        for _ in range(new_tokens):
            tokens = ids.shape[1]
            notes.shapes.append((tokens, tokens))
            executor.begin_pass(tokens, ids[0].tolist(), span=tokens)
            output = loaded.model(input_ids=ids, past_key_values=past, use_cache=True)
            device.wait_for_compute()
            past, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)


@pytest.mark.parametrize("slots", [24, 80])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "cpu-only"])
def test_engine_and_simulator_tell_one_story(policy: str, slots: int, loaded: LoadedModel) -> None:
    engine = tell_one_story(policy, slots, loaded)
    assert engine.disk_bytes == engine.ram_misses == engine.ram_hits == 0
    if policy == "prescope":
        assert engine.served_prefetch_in_time > 0
        assert engine.predictor_s > 0


@pytest.mark.parametrize("ram_experts", [60, 5])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "cpu-only"])
def test_they_do_so_when_ram_holds_only_some_experts(policy: str, ram_experts: int) -> None:
    loaded = open_model(ram_experts)
    try:
        engine = tell_one_story(policy, 24, loaded, new_tokens=8)
    finally:
        loaded.store.close()
    assert engine.ram_misses > 0
    assert engine.disk_bytes % loaded.store.slot_bytes == 0 < engine.disk_bytes
    assert 0 < engine.disk_stall_s <= engine.stall_s


def tell_one_story(
    policy: str, slots: int, loaded: LoadedModel, new_tokens: int = NEW_TOKENS
) -> Counters:
    """Run both; return what the engine counted, which is what the simulator counted."""
    survey = survey_routers(loaded.model, loaded.layers)
    predictor = LearningPredictor(
        survey.views, survey.embedding, torch.float32, DEFAULT_MODEL_DIR, None
    )
    assert not any(survey.reasons), survey.reasons
    device, notes = EmulatedDevice(PROFILE, virtual_clock=True), Notes()
    ram = copy.deepcopy(loaded.store.tier)
    ram.begin()
    executor = Executor(
        device,
        loaded.layers,
        loaded.store,
        PROFILE,
        slots,
        policy,
        virtual_clock=True,
        predictor=predictor,
        observe=notes,
    )
    attach(loaded.layers, executor.run)
    try:
        generate(loaded, executor, device, notes, new_tokens)
        engine, engine_s = executor.counters(), device.now_s()
        stalls = executor.stall_s_by_layer
    finally:
        executor.close()
    layer_bytes = tuple(layer.format.size_bytes for layer in loaded.layers)
    experts = tuple(layer.experts for layer in loaded.layers)
    setup = PolicySetup(experts, loaded.layers[0].top_k, layer_bytes, slots, Costs.of(PROFILE))
    simulated = simulate(
        notes.passes(),
        PROFILE,
        make_policy(policy, setup),
        slots,
        layer_bytes,
        chunk_bytes_for(PROFILE.link_bytes_per_s.value),
        predictor_bytes=predictor.weight_bytes,
        ram=ram,
    )
    assert simulated.counters == replace(engine, predictor_s=0.0)
    assert simulated.total_s == engine_s
    assert simulated.stall_s_by_layer == stalls
    if policy == "prescope":
        assert any(forward.predictions for forward in notes.passes())
    return engine
