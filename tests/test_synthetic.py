"""Synthetic traces behave as the published tables say, and are what the simulator can replay."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from assets.traces.replay import hit_percent
from runtime.synthetic import STATISTICS, synthetic_trace
from runtime.trace import ForwardPass, Guess, Prediction
from tests.replays import Choices, choices, decayed_frequency, hit_rate, lru, optimum

MODELS = sorted(STATISTICS)

# Cache sizes, then hit percentages of LRU, decayed frequency and the optimum, as published.
HITS = {
    "OLMoE": ((8, 16, 24), (47, 65, 76), (47, 66, 78), (63, 80, 88)),
    "gpt-oss-20b": ((4, 8, 12), (46, 68, 81), (46, 69, 83), (63, 82, 91)),
    "gpt-oss-120b": ((16, 32, 48), (63, 80, 89), (65, 82, 90), (79, 90, 95)),
    "Qwen3-30B-A3B": ((16, 32, 48), (61, 81, 91), (63, 82, 91), (77, 91, 96)),
    "Mixtral-8x7B": ((2, 3, 4), (37, 50, 62), (36, 50, 63), (56, 69, 79)),
    "DeepSeek-V2-Lite": ((8, 16, 24), (30, 47, 60), (30, 48, 62), (52, 70, 80)),
}
HIT_POINTS = 3.0

# Shares of the routed set among the k likeliest guesses, one and two layers ahead.
RECALL = {
    "OLMoE": (0.80, 0.78),
    "gpt-oss-20b": (0.87, 0.80),
    "gpt-oss-120b": (0.84, 0.77),
    "Qwen3-30B-A3B": (0.90, 0.86),
    "Mixtral-8x7B": (0.85, 0.80),
    "DeepSeek-V2-Lite": (0.79, 0.74),
}


def chats_back_to_back(name: str, first_seed: int) -> list[ForwardPass]:
    """Three chats of 700 tokens, 8 layers: the published replays carry the cache across chats."""
    seeds = range(first_seed, first_seed + 3)
    traces = [
        synthetic_trace(STATISTICS[name], seed=seed, passes=700, layers=8, predictions=False)
        for seed in seeds
    ]
    return [forward for trace in traces for forward in trace.passes]


@pytest.mark.parametrize("name", MODELS)
def test_caches_hit_as_often_as_in_the_published_replays(name: str) -> None:
    sizes, *wanted = HITS[name]
    lines = [chats_back_to_back(name, first_seed) for first_seed in (100, 200)]
    rules = (lru, decayed_frequency, optimum)
    found = [
        [
            100.0 * np.mean([hit_rate(line, rule, size, warm=700) for line in lines])
            for size in sizes
        ]
        for rule in rules
    ]
    off = np.asarray(found) - np.asarray(wanted)
    assert np.abs(off).max() <= HIT_POINTS, f"LRU, frequency, optimum off by\n{off.round(1)}"


def guesses_of(passes: Sequence[ForwardPass]) -> Iterator[tuple[ForwardPass, Prediction]]:
    for forward in passes:
        for step in (forward, *forward.layers):
            for prediction in step.predictions:
                yield forward, prediction


@functools.cache
def predicted(name: str) -> tuple[ForwardPass, ...]:
    return synthetic_trace(STATISTICS[name], seed=300, passes=300, layers=8).passes


def recall_at_k(passes: Sequence[ForwardPass], k: int, distance: int, layers: range) -> float:
    hits = uses = 0
    for forward, prediction in guesses_of(passes):
        if prediction.distance == distance and prediction.layer in layers:
            wanted = forward.layers[prediction.layer].demands
            hits += sum(guess.expert in wanted for guess in prediction.guesses[:k])
            uses += len(wanted)
    return hits / uses


@pytest.mark.parametrize("name", MODELS)
def test_lookahead_recalls_what_was_published_per_distance(name: str) -> None:
    k = STATISTICS[name].top_k
    found = [recall_at_k(predicted(name), k, distance, range(2, 8)) for distance in (1, 2)]
    assert np.abs(np.asarray(found) - RECALL[name]).max() <= 0.04, found
    early = recall_at_k(predicted(name), k, 1, range(1))
    assert early < found[1] - 0.15, "the tokens tell less about layer 0 than a layer about the next"


def test_misses_are_harder_to_foresee_than_hits_as_published() -> None:
    """Qwen3-30B-A3B beside 56 slots a layer; recall of misses and precision, at the 8 likeliest."""
    hits, issued, misses = np.zeros(2), np.zeros(2), np.zeros(2)
    for seed in (301, 302, 303):
        statistics = STATISTICS["Qwen3-30B-A3B"]
        resident: list[list[int]] = [[] for _ in range(8)]
        trace = synthetic_trace(statistics, seed=seed, passes=400, layers=8)
        for now, forward in enumerate(trace.passes):
            for _, made in guesses_of([forward]):
                if now >= 100 and made.layer >= 2:
                    held = set(resident[made.layer])
                    sent = {guess.expert for guess in made.guesses[:8]} - held
                    missed = forward.layers[made.layer].demands.keys() - held
                    hits[made.distance - 1] += len(sent & missed)
                    issued[made.distance - 1] += len(sent)
                    misses[made.distance - 1] += len(missed)
            for layer, step in enumerate(forward.layers):
                kept = [expert for expert in resident[layer] if expert not in step.demands]
                resident[layer] = [*kept, *step.demands][-56:]
    assert np.abs(hits / misses - (0.751, 0.669)).max() <= 0.05, hits / misses
    assert np.abs(hits / issued - (0.680, 0.550)).max() <= 0.10, hits / issued


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_probabilities_mean_what_they_say(name: str, batch: int) -> None:
    passes = predicted(name)
    if batch > 1:
        trace = synthetic_trace(STATISTICS[name], seed=302, passes=60, layers=8, batch=batch)
        passes = trace.passes
    scored = [
        (guess.probability, guess.expert in forward.layers[prediction.layer].demands)
        for forward, prediction in guesses_of(passes)
        if prediction.layer >= 2
        for guess in prediction.guesses
    ]
    probability, routed = np.asarray(scored, np.float64).T
    assert abs(probability.mean() - routed.mean()) <= 0.03
    for low in np.arange(0.0, 1.0, 0.2):
        inside = (probability >= low) & (probability <= low + 0.2)
        if inside.sum() > 200:
            said, true = probability[inside].mean(), routed[inside].mean()
            assert abs(said - true) <= 0.10, (low, said, true)


def test_predictions_come_where_the_engine_makes_them() -> None:
    statistics = STATISTICS["gpt-oss-20b"]
    trace = synthetic_trace(statistics, seed=1, passes=4, layers=5, prompt_tokens=8)
    prompt, *decode = trace.passes
    assert not list(guesses_of([prompt]))
    for forward in decode:
        made = [(p.layer, p.distance) for p in forward.predictions]
        assert made == [(0, 1), (1, 2)]
        for layer, step in enumerate(forward.layers):
            ahead = [(p.layer, p.distance) for p in step.predictions]
            assert ahead == [(layer + d, d) for d in (1, 2) if layer + d < 5]
        for _, prediction in guesses_of([forward]):
            experts = [guess.expert for guess in prediction.guesses]
            probabilities = [guess.probability for guess in prediction.guesses]
            assert len(experts) == len(set(experts)) == 2 * statistics.top_k
            assert probabilities == sorted(probabilities, reverse=True)
            assert 0.0 < probabilities[-1] <= probabilities[0] <= 1.0
            assert all(type(guess) is Guess for guess in prediction.guesses)
    silent = synthetic_trace(
        statistics, seed=1, passes=4, layers=5, prompt_tokens=8, predictions=False
    )
    assert not list(guesses_of(silent.passes))
    assert [p.layers[3].demands for p in silent.passes] == [
        p.layers[3].demands for p in trace.passes
    ], "asking for predictions must not change the routing"


def test_the_same_seed_gives_the_same_trace_and_another_another_one() -> None:
    statistics = STATISTICS["gpt-oss-20b"]
    first, again, other = (
        synthetic_trace(statistics, seed=seed, passes=20, layers=3, prompt_tokens=40)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.passes != other.passes


def test_fewer_layers_are_the_first_layers_of_the_whole_model() -> None:
    few, more = (
        synthetic_trace(STATISTICS["OLMoE"], seed=5, passes=9, layers=layers) for layers in (3, 6)
    )
    for a, b in zip(few.passes, more.passes, strict=True):
        assert [step.demands for step in a.layers] == [step.demands for step in b.layers[:3]]
        assert a.layers[0].predictions == b.layers[0].predictions


@pytest.mark.parametrize("name", MODELS)
def test_every_token_uses_top_k_experts_of_every_layer(name: str) -> None:
    statistics = STATISTICS[name]
    trace = synthetic_trace(
        statistics, seed=3, passes=5, batch=3, prompt_tokens=70, prompt_chunk=64, layers=3
    )
    assert [(p.tokens, p.span) for p in trace.passes] == [(192, 64), (18, 6)] + [(3, 1)] * 5
    assert trace.experts == (statistics.experts,) * 3
    for forward in trace.passes:
        assert len(forward.layers) == 3
        for step in forward.layers:
            assert sum(step.demands.values()) == forward.tokens * statistics.top_k
            assert 1 <= min(step.demands.values())
            assert max(step.demands.values()) <= forward.tokens
            assert list(step.demands) == sorted(step.demands)
            assert all(0 <= expert < statistics.experts for expert in step.demands)


def test_a_prompt_weighs_the_experts_of_its_last_64_tokens() -> None:
    """A prompt taken in token by token says what each token used, so it gives the right answer."""
    whole, single = (
        synthetic_trace(
            STATISTICS["DeepSeek-V2-Lite"], seed=4, passes=2, layers=2, prompt_tokens=70,
            prompt_chunk=chunk,
        )
        for chunk in (70, 1)
    )  # fmt: skip
    tokens = single.passes[:70]
    for layer in range(2):
        used: dict[int, int] = {}
        weight: dict[int, float] = {}
        for number, forward in enumerate(tokens):
            ago = 69 - number
            for expert in forward.layers[layer].demands:
                used[expert] = used.get(expert, 0) + 1
                if ago < 64:
                    weight[expert] = weight.get(expert, 0.0) + 0.5 ** (ago / 16)
        step = whole.passes[0].layers[layer]
        assert step.demands == used
        assert step.recency == pytest.approx(weight)
    assert [p.layers for p in whole.passes[1:]] == [p.layers for p in single.passes[70:]]
    assert all(step.recency is None for p in whole.passes[1:] for step in p.layers)


def test_a_larger_batch_uses_more_experts_but_shares_some() -> None:
    statistics = STATISTICS["Qwen3-30B-A3B"]
    distinct = []
    for batch in (1, 4, 16):
        trace = synthetic_trace(
            statistics, seed=6, passes=20, batch=batch, layers=8, predictions=False
        )
        steps = [step for forward in trace.passes for step in forward.layers]
        distinct.append(np.mean([len(step.demands) for step in steps]))
    unrelated = [128 * (1 - (1 - 8 / 128) ** batch) for batch in (4, 16)]
    assert distinct[0] == 8
    assert 8 < distinct[1] < unrelated[0]
    assert distinct[1] < distinct[2] < unrelated[1]


def hits_of_any_cache(tokens: Choices, slots: int) -> int:
    """Try every content a cache can have after every token."""
    best = {frozenset[int](): 0}
    for wanted in tokens:
        following: dict[frozenset[int], int] = {}
        for content, hits in best.items():
            total = hits + len(content & wanted)
            held = sorted(content | wanted)
            for size in range(slots + 1):
                for kept in map(frozenset, itertools.combinations(held, size)):
                    following[kept] = max(total, following.get(kept, 0))
        best = following
    return max(best.values())


def random_tokens(rng: random.Random, count: int, experts: int, k: int) -> list[frozenset[int]]:
    favourites = rng.sample(range(experts), experts // 2)
    pools = (favourites, range(experts))
    return [frozenset(rng.sample(pools[rng.random() < 0.4], k)) for _ in range(count)]


def test_the_reference_replays_do_what_they_say() -> None:
    one_by_one = [frozenset({expert}) for expert in (0, 1, 0, 2, 1)]
    assert lru(one_by_one, 2) == [0, 0, 1, 0, 0]
    assert optimum(one_by_one, 2) == [0, 0, 1, 0, 1]
    often = [frozenset({expert}) for expert in (0, 0, 0, 1, 0)]
    assert lru(often, 1) == [0, 1, 1, 0, 0]
    assert decayed_frequency(often, 1) == [0, 1, 1, 0, 1], "one use does not outweigh three"
    assert decayed_frequency(often, 1, half_life=0.1) == [0, 1, 1, 0, 0], (
        "unless they are forgotten"
    )
    pairs = [frozenset(pair) for pair in ((0, 1), (1, 2), (0, 2))]
    assert lru(pairs, 2) == [0, 1, 1], "both are looked up before either is replaced"
    assert decayed_frequency(pairs, 2) == [0, 1, 1]


def test_the_optimum_is_the_best_that_any_cache_can_do() -> None:
    rng = random.Random(8)
    for _ in range(60):
        tokens = random_tokens(rng, 8, 6, 2)
        for slots in (1, 2, 3):
            assert sum(optimum(tokens, slots)) == hits_of_any_cache(tokens, slots)


def test_the_fit_replays_by_the_same_rules() -> None:
    trace = synthetic_trace(STATISTICS["OLMoE"], seed=9, passes=300, layers=2, predictions=False)
    routed = np.zeros((300, 2, 64), bool)
    for layer in range(2):
        for token, experts in enumerate(choices(trace.passes, layer)):
            routed[token, layer, list(experts)] = True
    sizes = (8, 16, 24)
    plain = [
        [100.0 * hit_rate(trace.passes, rule, size, warm=50) for size in sizes]
        for rule in (lru, decayed_frequency, optimum)
    ]
    assert hit_percent(routed, sizes, 50) == pytest.approx(np.asarray(plain), abs=0.2)
