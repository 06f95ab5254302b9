"""`bench predictor`, on a few chats: what ships beats router reuse and costs what it may."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.bench import predictor as suite
from runtime.bench.predictor_reading import CHATS, Reading, read_chats
from runtime.bench.predictor_replay import Pool, replay
from runtime.core import ExpertId
from runtime.errors import ModelFilesError
from runtime.predictor import Predictor
from runtime.trace import load_trace
from tests.routing_streams import LAYERS, TOP_K, embedding, stream, views

TRACES = Path(__file__).parent.parent / "assets" / "traces"
GROUPS = {"near input", "middle", "near output"}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """One short run of the suite on the default model."""
    patch = pytest.MonkeyPatch()
    patch.setattr(suite, "CHATS_USED", 26)
    patch.setattr(suite, "IDLE_S", 0.05)
    options = argparse.Namespace(model="default", cache_fraction=None)
    found = suite.run(options, lambda text: None)
    patch.undo()
    return found


def test_learned_heads_beat_router_reuse_in_every_layer_and_meet_the_aim(
    result: dict[str, Any],
) -> None:
    assert result["summary"]["notices"] == []
    assert len(result["layers"]) == 11
    for row in result["layers"]:
        assert row["in_use"] == "learned"
        assert row["learned"]["recall_at_k"] > row["router_reuse"]["recall_at_k"] + 0.02, row
    summary = result["summary"]
    for distance, aim in suite.TARGETS.items():
        assert summary["recall_at_k"][distance] > aim
        assert summary["recall_at_k"][distance] > summary["router_reuse_recall_at_k"][distance]
        assert summary["recall_of_misses"][distance] > 0.5
    assert 0.0 < summary["cost_share_of_token"] <= suite.MAX_SHARE
    assert summary["cost_share_of_token_cpu"] > 0.0


def test_the_floor_over_seeds_is_met_in_every_group(result: dict[str, Any]) -> None:
    seeds = result["summary"]["seeds"]
    assert seeds["runs"] >= 3
    assert set(seeds["groups"]) == GROUPS
    assert all(group["floor_met"] for group in seeds["groups"].values())


def test_figures_of_a_row_agree_with_each_other(result: dict[str, Any]) -> None:
    for row in result["layers"]:
        for name in ("router_reuse", "router_reuse_online", "learned", "learned_online"):
            figures = row[name]
            assert figures["recall_at_k"] <= figures["recall_at_2k"]
            assert figures["precision_at_2k"] == pytest.approx(figures["recall_at_2k"] / 2)
            assert all(0.0 <= v <= 1.0 for k, v in figures.items() if k != "missing_per_token")
        # What is missing does not depend on who guesses.
        missing = {row[name]["missing_per_token"] for name in ("router_reuse", "learned")}
        assert len(missing) == 1


def test_the_words_say_whether_the_aims_are_met(result: dict[str, Any]) -> None:
    text = suite.tell(result)
    assert text.count("met") == 3
    assert "not met" not in text


def read_stream(seed: int, prompt: int, tokens: int) -> Reading:
    rows = [row for row, _ in zip(stream(seed), range(tokens), strict=False)]
    return Reading(
        torch.cat([row.ids for row in rows]),
        prompt,
        *(
            tuple(torch.cat([getattr(row, name)[layer] for row in rows]) for layer in range(LAYERS))
            for name in ("inputs", "chosen", "weights")
        ),
    )


def test_counts_are_those_of_a_plain_count() -> None:
    reading, slots = read_stream(1, prompt=4, tokens=30), 12
    tallies = replay(Predictor(views(), embedding(), torch.float32), [reading], slots)
    assert {tally.routed for tally in tallies.values()} == {26 * TOP_K}
    routers = views()
    met, missing_met, missing = 0, 0, 0
    order: list[ExpertId] = []
    for token in range(30):
        for layer in range(LAYERS):
            wanted = set(reading.chosen[layer][token].tolist())
            if layer == 2 and token >= 4:
                ratio = routers[2].gain / routers[1].gain
                scores = (reading.inputs[1][token] * ratio) @ routers[2].weight.T
                best = set(scores.topk(TOP_K).indices.tolist())
                gone = {e for e in wanted if ExpertId(2, e) not in order[-slots:]}
                met += len(best & wanted)
                missing += len(gone)
                missing_met += len(best & gone)
            for expert in reading.chosen[layer][token].tolist():
                used = ExpertId(layer, expert)
                order = [*(e for e in order if e != used), used]
    tally = tallies[2, 1]
    assert (tally.met_at_k, tally.missing, tally.missing_met) == (met, missing, missing_met)


def test_a_pool_forgets_what_was_used_longest_ago() -> None:
    pool = Pool(2)
    for expert in (0, 1, 0, 2):
        pool.use(ExpertId(0, expert))
    assert [ExpertId(0, e) in pool for e in (0, 1, 2)] == [True, False, True]


def test_a_damaged_list_of_chats_is_named(tmp_path: Path) -> None:
    path = tmp_path / CHATS
    path.write_text("[[]]")
    with pytest.raises(ModelFilesError, match=CHATS):
        read_chats(path)


def test_the_committed_trace_is_of_the_default_model_with_guesses() -> None:
    path = TRACES / "default_decode.jsonl.gz"
    assert path.stat().st_size < 1 << 20
    trace = load_trace(path)
    assert (trace.experts, trace.top_k) == ((32,) * 6, 4)
    decode = [one for one in trace.passes if one.tokens == 1]
    assert len(decode) >= 600
    for one in decode:
        assert {(p.layer, p.distance) for p in one.predictions} == {(0, 1), (1, 2)}
        assert [len(step.predictions) for step in one.layers] == [2, 2, 2, 2, 1, 0]
        assert all(len(step.demands) == 4 for step in one.layers)
    prompts = [one for one in trace.passes if one.tokens > 1]
    assert all(step.recency for one in prompts for step in one.layers)
