"""Requests answered together get, to the last bit, what each would get alone; bytes are shared."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

import runtime.engine_generation as engine_generation
from runtime.core import POLICIES, PolicyName, SamplingParams
from runtime.engine import Engine
from runtime.layer_rows import RoutedTokens
from runtime.loader import LoadedModel
from runtime.sequences import Conversation
from runtime.telemetry import Counters
from tests.batches import (
    CHUNK_TOKENS,
    NotedSampler,
    Request,
    alone,
    assert_same,
    engine_over,
    models_made_once,
    requests_for,
    together,
)
from tests.families import FAMILIES


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_generation, "Sampler", NotedSampler)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LoadedModel]:
    return models_made_once(tmp_path_factory)


# Of those with caches of their own kind; all families were compared when this was written.
OTHER_KINDS = (
    "gemma4_text",
    "granitemoehybrid",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "nemotron_h",
)


@pytest.mark.families
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_KINDS])
def test_five_together_are_bitwise_each_alone_in_every_family(
    family: str, models: Callable[[str], LoadedModel]
) -> None:
    with engine_over(models(family)) as engine:
        assert_same(together(engine, requests_for(5)), alone(engine, requests_for(5)))


@pytest.mark.parametrize("count", [1, 2, 16, 19])
def test_any_number_together_is_bitwise_each_alone(
    count: int, models: Callable[[str], LoadedModel]
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        assert_same(together(engine, requests_for(count)), alone(engine, requests_for(count)))


@pytest.mark.parametrize("slots", [1, 3, 16])
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "cpu-only"])
def test_under_every_policy_and_cache_size_they_are_bitwise_each_alone(
    policy: PolicyName, slots: int, models: Callable[[str], LoadedModel]
) -> None:
    loaded = models("gpt_oss")
    with engine_over(loaded) as reference:
        expected = alone(reference, requests_for(4))
    with engine_over(loaded, policy, slots) as engine:
        assert_same(together(engine, requests_for(4)), expected)


def test_the_comparison_notices_a_row_of_somebody_else(
    models: Callable[[str], LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        expected = alone(engine, requests_for(3))
        honest = engine.parts.executor.run_together

        def swapped(layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
            rows = honest(layer, parts)
            if len(rows) > 1:
                rows[0], rows[1] = rows[0].roll(1, -1), rows[1]
            return rows

        monkeypatch.setattr(engine._passes.meeting, "_run_together", swapped)
        with pytest.raises(AssertionError):
            assert_same(together(engine, requests_for(3)), expected)


@pytest.mark.parametrize("kv_tokens", [60, 100])
def test_with_little_room_for_keys_and_values_they_wait_and_are_bitwise_each_alone(
    kv_tokens: int, models: Callable[[str], LoadedModel]
) -> None:
    with engine_over(models("qwen3_moe"), kv_tokens=kv_tokens) as engine:
        requests = requests_for(8)
        expected = alone(engine, requests)
        waited = 0
        grow = engine._conversations.grow

        def noted(conversation: Conversation, tokens: int) -> bool:
            nonlocal waited
            granted = grow(conversation, tokens)
            waited += not granted
            store = engine._conversations
            assert store.tokens + store.taken_tokens <= kv_tokens
            return granted

        engine._conversations.grow = noted  # type: ignore[method-assign]
        assert_same(together(engine, requests), expected)
        assert waited > 0


# What is shared


def gained(engine: Engine, work: Callable[[], object]) -> Counters:
    before = engine.parts.executor.counters()
    work()
    return engine.parts.executor.counters().since(before)


@pytest.mark.parametrize(("count", "text"), [(2, "abc"), (5, "abc"), (5, "longer than a chunk")])
def test_identical_prompts_move_the_bytes_of_one(
    count: int, text: str, models: Callable[[str], LoadedModel]
) -> None:
    """Exactly those of one if they are read in one pass; later they are a few passes apart."""
    same = [Request(text, SamplingParams(max_new_tokens=12))] * count
    loaded = models("qwen3_moe")
    with engine_over(loaded, "on-demand", 8) as engine:
        one = gained(engine, lambda: together(engine, same[:1]))
    with engine_over(loaded, "on-demand", 8) as engine:
        many = gained(engine, lambda: together(engine, same))
    assert one.link_bytes_issued > 0
    if count * len(text) <= CHUNK_TOKENS:
        assert many.link_bytes_issued == one.link_bytes_issued
        assert (many.forward_passes, many.routed) == (one.forward_passes, one.routed)
    else:
        assert many.link_bytes_issued < 0.7 * count * one.link_bytes_issued
        assert many.forward_passes < one.forward_passes + 2 * count


def test_what_several_demand_moves_once_a_layer(models: Callable[[str], LoadedModel]) -> None:
    """Slots for one expert: whatever is demanded moves anew in every layer, once."""
    loaded = models("mixtral")
    with engine_over(loaded, "on-demand", 1) as engine:
        unions = 0
        honest = engine.parts.executor.run_together

        def counted(layer: int, parts: Sequence[RoutedTokens]) -> list[torch.Tensor]:
            nonlocal unions
            wanted = [set(part.top_k_index.flatten().tolist()) for part in parts]
            assert len(parts) == 1 or sum(map(len, wanted)) > len(set().union(*wanted))
            unions += len(set().union(*wanted))
            return honest(layer, parts)

        engine._passes.meeting._run_together = counted
        requests = [
            Request(text, SamplingParams(max_new_tokens=6)) for text in ("abcdefgh", "hgfedcba")
        ]
        counters = gained(engine, lambda: together(engine, requests))
        assert counters.routed == unions
        size = loaded.layers[0].format.size_bytes
        assert counters.link_bytes_on_demand == counters.served_on_demand * size <= unions * size


def test_four_together_are_faster_than_one_after_the_other(
    models: Callable[[str], LoadedModel],
) -> None:
    requests = [
        Request(text, SamplingParams(max_new_tokens=24)) for text in ("one", "two", "three", "four")
    ]

    def seconds(answer: Callable[[Engine, Sequence[Request]], object]) -> float:
        with engine_over(models("qwen3_moe"), "on-demand", 5) as engine:
            answer(engine, requests)
            return engine.parts.device.now_s()

    assert seconds(together) < seconds(alone)


def test_figures_add_up_for_everybody_and_speed_is_ones_own(
    models: Callable[[str], LoadedModel],
) -> None:
    with engine_over(models("qwen3_moe")) as engine:
        for answer in together(engine, requests_for(7)):
            stats = answer.stats
            served = (
                stats.served_resident
                + stats.served_prefetch_in_time
                + stats.served_prefetch_late
                + stats.served_on_demand
                + stats.served_cpu
            )
            assert stats.routed == served > 0
            assert stats.new_tokens == len(answer.ids)
            assert stats.ttft_s > 0
            assert (stats.decode_tokens_per_s > 0) == (stats.new_tokens > 1)
