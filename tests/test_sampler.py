"""Sampling equals transformers' own filters, keeps its promises, and a seed decides everything."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime import sampler
from runtime.core import SamplingParams
from runtime.errors import ModelError, RequestError
from runtime.sampler import Sampler, check_params, filtered, penalise

PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.1, 3.0),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 0.99, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 10_000]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
SEEDS = st.integers(0, 2**32)


def logits_of(seed: int, size: int = 300, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def distribution(scores: torch.Tensor, params: SamplingParams, seen: set[int]) -> torch.Tensor:
    if params.repetition_penalty != 1.0:
        scores = penalise(scores, seen, params.repetition_penalty)
    ids, weights = filtered(scores, params)
    return torch.zeros(len(scores)).index_add(0, ids, weights)


def reference(scores: torch.Tensor, params: SamplingParams, seen: set[int]) -> torch.Tensor:
    chain = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    ids = torch.tensor([sorted(seen)], dtype=torch.long)
    return chain(ids, scores[None].clone())[0].softmax(-1)


@settings(max_examples=150, deadline=None)
@given(SEEDS, PARAMS, st.sets(st.integers(0, 299), min_size=1, max_size=40))
def test_filters_equal_those_of_transformers(
    seed: int, params: SamplingParams, seen: set[int]
) -> None:
    scores = logits_of(seed)
    ours, theirs = distribution(scores, params, seen), reference(scores, params, seen)
    differs = (ours > 0) != (theirs > 0)
    # Where rounding decides which side of `top_p` a token falls on, one token may differ.
    assert int(differs.sum()) <= (1 if params.top_p < 1.0 else 0)
    if not differs.any():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spread", [0.001, 4.0])
def test_a_large_vocabulary_gives_the_same_whether_or_not_the_short_list_is_enough(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.9)
    scores = logits_of(1, 50_000, spread)
    short = distribution(scores, params, set())
    monkeypatch.setattr(sampler, "SHORT_LIST", 10**9)
    whole = distribution(scores, params, set())
    torch.testing.assert_close(short, whole)
    assert (whole > 0).sum() < 50_000


@settings(max_examples=50, deadline=None)
@given(SEEDS, SEEDS, PARAMS)
def test_the_same_seed_gives_the_same_tokens(
    seed: int, data_seed: int, params: SamplingParams
) -> None:
    params = replace(params, seed=seed)
    rows = [logits_of(data_seed + step) for step in range(6)]
    first, second = Sampler(params, [1]), Sampler(params, [1])
    assert [first.next_token(r) for r in rows] == [second.next_token(r) for r in rows]


def test_without_a_seed_two_runs_differ() -> None:
    params = SamplingParams(temperature=3.0)
    runs = {
        tuple(one.next_token(logits_of(step)) for step in range(12))
        for one in (Sampler(params, []) for _ in range(4))
    }
    assert len(runs) > 1


def test_tokens_are_drawn_as_often_as_their_weight_says() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, -30.0])
    one = Sampler(SamplingParams(temperature=1.0, seed=3), [])
    drawn = torch.tensor([one.next_token(scores) for _ in range(4000)])
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, scores.softmax(-1), atol=0.03, rtol=0)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_zero_temperature_takes_the_likeliest(seed: int) -> None:
    scores = logits_of(seed)
    assert Sampler(SamplingParams(), []).next_token(scores) == int(scores.argmax())


def test_half_precision_is_sampled_in_full_precision() -> None:
    scores = logits_of(5).to(torch.bfloat16)
    params = SamplingParams(temperature=0.7, top_p=0.9, seed=1)
    half, full = Sampler(params, []), Sampler(params, [])
    assert [half.next_token(scores) for _ in range(20)] == [
        full.next_token(scores.float()) for _ in range(20)
    ]


def test_a_repeated_token_becomes_less_likely() -> None:
    scores = torch.tensor([2.0, 1.9, -1.0])
    greedy = Sampler(SamplingParams(repetition_penalty=1.2), [])
    assert [greedy.next_token(scores) for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_invalid_numbers_are_named(temperature: float, bad: float, penalty: float) -> None:
    scores = logits_of(1)
    scores[17] = bad
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty)
    with pytest.raises(ModelError, match="invalid numbers"):
        Sampler(params, [2]).next_token(scores)


def test_nothing_but_minus_infinity_is_named() -> None:
    with pytest.raises(ModelError):
        Sampler(SamplingParams(), []).next_token(torch.full((9,), -float("inf")))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=0),
        SamplingParams(temperature=-0.1),
        SamplingParams(temperature=float("nan")),
        SamplingParams(top_p=1.1),
        SamplingParams(min_p=-1),
        SamplingParams(top_k=-1),
        SamplingParams(repetition_penalty=0.0),
        SamplingParams(seed=2**64),
    ],
)
def test_values_out_of_range_are_refused(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="must be"):
        check_params(params)
