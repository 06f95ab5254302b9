"""The executor on a real card: the same promises as on the emulated one."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.core import HardwareProfile, PolicyName
from runtime.executor import Executor
from runtime.loader import load_model
from tests.families import make_checkpoint
from tests.machines import emulated_profile
from tests.test_equivalence import NEXT, PROMPT

pytestmark = pytest.mark.gpu

CPU_BOUND = 1e-4
"""How far logits may move in float32 when the CPU computes some of the experts."""


def profile() -> HardwareProfile:
    """Rates of a desktop card; on the card itself they only steer the split."""
    return emulated_profile(link_bytes_per_s=25e9, cpu_bytes_per_s=55e9)


def logits_on_card(model: Any, executor: Executor | None) -> list[torch.Tensor]:
    """Logits of a prefill and a cached decode step, read on the stream that computed them."""
    found = []
    past = None
    with torch.inference_mode(), executor.computing() if executor else nullcontext():
        for ids in (PROMPT, NEXT):
            if executor is not None:
                executor.begin_pass(ids.numel())
            output = model(input_ids=ids.cuda(), past_key_values=past, use_cache=True)
            past = output.past_key_values
            found.append(output.logits.cpu())
    return found


def eager_on_card(folder: Path) -> list[torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return logits_on_card(model.eval().cuda(), None)


@pytest.mark.parametrize("slots", [3, 6, 16])
@pytest.mark.parametrize("policy", ["on-demand", "cpu-miss", "hybrid"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_every_policy_and_cache_size_agrees_with_eager_on_the_card(
    family: str, policy: PolicyName, slots: int, tmp_path: Path
) -> None:
    from runtime.device_cuda import CudaDevice

    folder = make_checkpoint(family, tmp_path)
    theirs = eager_on_card(folder)
    device = CudaDevice(4 << 30)
    loaded = load_model(
        folder,
        torch_device=device.torch_device,
        dtype=torch.float32,
        allocate_host=device.allocate_host,
        progress=lambda progress: None,
        cancelled=lambda: False,
    )
    executor = Executor(device, loaded.layers, loaded.store, profile(), slots, policy)
    attach(loaded.layers, executor.run)
    try:
        ours = logits_on_card(loaded.model, executor)
        counters = executor.counters()
    finally:
        executor.close()
    assert sum(counters.served) == counters.routed > 0
    for mine, reference in zip(ours, theirs, strict=True):
        if counters.served_cpu:
            assert (mine - reference).abs().max() < CPU_BOUND
        else:
            assert torch.equal(mine, reference)
