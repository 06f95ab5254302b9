"""The shipped model answers with the same tokens whatever the plan, cache size or clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter import attach
from runtime.core import POLICIES, EmulatedMachine, PolicyName
from runtime.device_emulated import EmulatedDevice
from runtime.device_host import HostDevice
from runtime.executor import Executor
from runtime.loader import LoadedModel, load_model
from runtime.profiles import Memory, emulated_profile

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "default_model"
RAM = Memory(8 << 30, 4 << 30)
PROFILE = emulated_profile(EmulatedMachine(), RAM)
NEW_TOKENS = 20
PROMPTS = (
    "What is a cache hit?",
    "What is 47 + 38?",
    "Hello there!",
    "Tell me a story about a fox named Zoe and a silver lamp.",
    "Convert 17 hours to minutes.",
    "x" * 40,
)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(
        FOLDER,
        torch_device=torch.device("cpu"),
        dtype=torch.float32,
        allocate_host=lambda size: torch.empty(size, dtype=torch.uint8),
        progress=lambda progress: None,
        cancelled=lambda: False,
    )


def prompt_ids(loaded: LoadedModel, text: str) -> torch.Tensor:
    ids: torch.Tensor = loaded.tokenizer.apply_chat_template(  # type: ignore[union-attr]
        [{"role": "user", "content": text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )["input_ids"]
    return ids


@pytest.fixture(scope="module")
def expected(loaded: LoadedModel) -> list[list[int]]:
    """Greedy tokens of the stock model with transformers' own experts and decoding."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(
        FOLDER, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    answers = []
    for text in PROMPTS:
        ids = prompt_ids(loaded, text)
        output = stock.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        answers.append(output[0, ids.shape[1] :].tolist())
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)
    return answers


def greedy(loaded: LoadedModel, executor: Executor, text: str) -> list[int]:
    ids = prompt_ids(loaded, text)
    past: Any = None
    tokens: list[int] = []
    with torch.inference_mode(), executor.computing():
        while len(tokens) < NEW_TOKENS:
            executor.begin_pass(ids.shape[1])
            output = loaded.model(
                input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1
            )
            past = output.past_key_values
            ids = output.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(int(ids))
            if tokens[-1] in loaded.eos_token_ids:
                break
    return tokens


def answers_of(loaded: LoadedModel, executor: Executor) -> list[list[int]]:
    attach(loaded.layers, executor.run)
    try:
        return [greedy(loaded, executor, text) for text in PROMPTS]
    finally:
        executor.close()


@pytest.mark.parametrize("slots", [1, 48, 192])
@pytest.mark.parametrize("policy", POLICIES[:3])
def test_every_plan_gives_the_stock_models_tokens(
    policy: PolicyName, slots: int, loaded: LoadedModel, expected: list[list[int]]
) -> None:
    device = EmulatedDevice(PROFILE, virtual_clock=True)
    executor = Executor(
        device, loaded.layers, loaded.store, PROFILE, slots, policy, virtual_clock=True
    )
    assert answers_of(loaded, executor) == expected
    assert executor.counters().served_on_demand > 0


def test_the_transfer_thread_in_real_time_gives_the_same_tokens(
    loaded: LoadedModel, expected: list[list[int]]
) -> None:
    machine = EmulatedMachine(link_bytes_per_s=1e9, host_layer_s=0, link_call_s=0)
    fast = emulated_profile(machine, RAM)
    executor = Executor(EmulatedDevice(fast), loaded.layers, loaded.store, fast, 12, "on-demand")
    assert answers_of(loaded, executor) == expected


def test_experts_in_place_give_the_same_tokens(
    loaded: LoadedModel, expected: list[list[int]]
) -> None:
    executor = Executor(HostDevice(), loaded.layers, loaded.store, PROFILE, 0, "cpu-only")
    assert answers_of(loaded, executor) == expected
