"""A tiny random Qwen3-MoE with a ChatML tokenizer, and an engine over it without a card.

Its experts are transformers' own; the stand-in executor only counts, so that what is tested is the
decoding loop and nothing below it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from runtime.adapter_cache import KvCache
from runtime.core import HardwareProfile, MemoryPlan, ModelShape, Reading, TelemetrySnapshot
from runtime.engine import Engine
from runtime.engine_parts import EngineParts
from runtime.layer_rows import RoutedTokens
from runtime.telemetry import Counters

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>")
LAYERS, EXPERTS, TOP_K = 3, 8, 2
CONTEXT_TOKENS = 512


@cache
def tokenizer(template: str = CHATML, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: one token a byte, so characters are often split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in extra])
    raw.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>")
    made.chat_template = template
    return made


@cache
def model(seed: int = 0) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=CONTEXT_TOKENS,
        norm_topk_prob=True,
        eos_token_id=tokenizer().convert_tokens_to_ids("<|im_end|>"),
    )
    config._experts_implementation = "eager"
    return Qwen3MoeForCausalLM(config).float().eval().requires_grad_(False)


class StandInDevice:
    """Time that passes only when told to, so that figures are exact."""

    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def wait_for_compute(self) -> None:
        self.time_s += 0.5


class RealTimeDevice(StandInDevice):
    def now_s(self) -> float:
        return time.perf_counter()

    def wait_for_compute(self) -> None:
        pass


class StandInExecutor:
    """Counts passes as if every expert were resident; calls `between` in each pass."""

    def __init__(self) -> None:
        self.policy = "on-demand"
        self.slots = self.slots_used = LAYERS * EXPERTS
        self.look_ahead = False
        self.verdict = None
        self.stall_s_by_layer = (0.0,) * LAYERS
        self.ram_experts = LAYERS * EXPERTS
        self.passes: list[int] = []
        self.prediction = True
        self.resets = 0
        self.shrinks = 0
        self.idle_s = 0.0
        self.closed = False
        self._counters = Counters()

    def set_policy(self, policy: str) -> None:
        self.policy = policy

    def set_prediction(self, on: bool) -> None:
        self.prediction = on

    def reset_predictor(self) -> None:
        self.resets += 1

    def idle(self, budget_s: float) -> None:
        self.idle_s += budget_s

    def shrink(self) -> bool:
        self.slots = max(self.slots * 3 // 4, TOP_K)
        self.shrinks += 1
        return self.shrinks < 9

    def begin_pass(self, tokens: int, token_ids: Sequence[int] = (), span: int = 1) -> None:
        assert len(token_ids) == tokens >= span
        self.passes.append(tokens)
        self._counters.forward_passes += 1
        self._counters.routed += LAYERS * TOP_K
        self._counters.served_resident += LAYERS * TOP_K

    def run_together(self, layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
        raise AssertionError("this model's experts are transformers' own")

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext()

    def counters(self) -> Counters:
        return self._counters.copy()

    def heat(self) -> bytes:
        return bytes(LAYERS * EXPERTS)

    def close(self) -> None:
        self.closed = True


def profile() -> HardwareProfile:
    none = Reading(1.0, "assumed")
    return HardwareProfile(
        "emulated", "stand-in", 0, 0, 0, 0, none, none, none, none, none, none, none, none, none
    )


def engine(
    *,
    network: Callable[..., Any] | None = None,
    words: Any = None,
    config: Any = None,
    new_cache: Callable[[], Any] | None = None,
    kv_tokens: int = CONTEXT_TOKENS,
    context_tokens: int = CONTEXT_TOKENS,
    chunk: int = 512,
    eos: Sequence[int] | None = None,
    executor: StandInExecutor | None = None,
    device: StandInDevice | None = None,
    publish: Callable[[TelemetrySnapshot], None] = lambda snapshot: None,
) -> Engine:
    words = words if words is not None else tokenizer()
    executor = executor or StandInExecutor()
    config = config if config is not None else model().config
    parts = EngineParts(
        model=network or model(),
        tokenizer=words,
        shape=ModelShape("tiny", (EXPERTS,) * LAYERS, TOP_K, 100, 1000, 10, context_tokens),
        context_tokens=context_tokens,
        eos_token_ids=frozenset(eos if eos is not None else [words.eos_token_id]),
        new_cache=new_cache or (lambda: KvCache(config)),
        device=device or StandInDevice(),
        executor=executor,
        profile=profile(),
        plan=MemoryPlan(10**6, 1000, kv_tokens, kv_tokens * 10, 0, 0, 24, 100),
        close=executor.close,
    )
    return Engine(parts, publish, chunk)
