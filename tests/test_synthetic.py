"""Synthetic traces behave as the published tables say, and are what the simulator can replay."""

from __future__ import annotations

from runtime.synthetic import STATISTICS, synthetic_trace


def test_the_same_seed_gives_the_same_trace_and_another_another_one() -> None:
    statistics = STATISTICS["gpt-oss-20b"]
    first, again, other = (
        synthetic_trace(statistics, seed=seed, passes=20, layers=3, prompt_tokens=40)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.passes != other.passes


def test_every_token_uses_top_k_experts_of_every_layer() -> None:
    for statistics in STATISTICS.values():
        trace = synthetic_trace(
            statistics, seed=3, passes=5, batch=3, prompt_tokens=70, prompt_chunk=64, layers=3
        )
        assert [(p.tokens, p.span) for p in trace.passes] == [(192, 64), (18, 6)] + [(3, 1)] * 5
        for forward in trace.passes:
            assert len(forward.layers) == 3
            for step in forward.layers:
                assert sum(step.demands.values()) == forward.tokens * statistics.top_k
                assert max(step.demands.values()) <= forward.tokens
                assert list(step.demands) == sorted(step.demands)
