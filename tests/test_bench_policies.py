"""`bench policies`: its cells were chosen before its results, and its figures add up."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.__main__ import main
from runtime.activation_tracing import MoeInfinityTracer
from runtime.bench import policies_live, policies_measure, policies_planning
from runtime.bench.policies import ABLATIONS, tell
from runtime.bench.policies_bound import bound_s
from runtime.bench.policies_cells import (
    BATCHES,
    CELLS_FILE,
    FULL_SHARE,
    MAIN_MODELS,
    PAPER_BATCHES,
    PAPER_MACHINE,
    PAPER_RESIDENCIES,
    PHASES,
    RESERVE_BYTES,
    RESIDENCIES,
    Cell,
    by_hash,
    cells_by_rule,
    fixed_cells,
    full_cells,
    machines,
    quick_cells,
)
from runtime.bench.policies_chats import COLLECTED, collected, preloaded, session_of
from runtime.bench.policies_measure import (
    RIVALS,
    CellResults,
    Result,
    planning_costs,
    run_cell,
)
from runtime.bench.policies_models import MODELS
from runtime.bench.policies_summary import TARGETS, rows, summary, targets
from runtime.core import ExpertId
from runtime.machines import CARDS, CPUS, HOST_LAYER_S, LINKS, MACHINES, Machine
from runtime.policy import PolicySetup
from runtime.policy_table import make_oracle, make_policy
from runtime.scheduler import Costs
from runtime.simulate import simulate
from runtime.simulate_deciding import Deciding
from runtime.synthetic import STATISTICS
from runtime.trace import ForwardPass, Guess, LayerStep, Prediction

ALL_POLICIES = {*RIVALS, "prescope", "oracle"}
TRIED = ({**RIVALS, "prescope": ({},)}).items()
CELLS_SHA256 = "14016f3bcd4738046e277b2a2aae863431d56b98985ec282e18466ecec7c6298"


def test_the_cells_are_those_that_were_committed_before_any_result() -> None:
    assert hashlib.sha256(CELLS_FILE.read_bytes()).hexdigest() == CELLS_SHA256
    assert fixed_cells() == cells_by_rule()
    assert len(set(fixed_cells())) == len(fixed_cells()) == 306


def test_both_phases_cover_every_value_of_every_axis() -> None:
    for phase in PHASES:
        cells = [c for c in fixed_cells() if c.phase == phase and c.setting == "main"]
        strata = Counter((c.model, c.residency, c.batch) for c in cells)
        assert len(strata) == len(MAIN_MODELS) * len(RESIDENCIES) * len(BATCHES)
        assert len(set(strata.values())) == 1
        # Links are balanced exactly; what has to fit the card only roughly.
        assert len(set(Counter(c.machine.link for c in cells).values())) == 1
        for values, axis in (
            (CARDS, [c.machine.card for c in cells]),
            (LINKS, [c.machine.link for c in cells]),
            (CPUS, [c.machine.cpu for c in cells]),
            (HOST_LAYER_S, [c.machine.host_layer_s for c in cells]),
        ):
            seen = Counter(axis)
            assert set(seen) == set(values)
            assert min(seen.values()) >= len(cells) / len(values) / 3
        for link in LINKS:
            assert {c.batch for c in cells if c.machine.link == link} == set(BATCHES)


def test_slots_fit_the_card_but_where_none_can_hold_them() -> None:
    largest = max(card.vram_bytes for card in CARDS.values())
    for cell in fixed_cells():
        if not cell.fits:
            assert (cell.model, cell.residency) == ("gpt-oss-120b", 0.5)
            assert CARDS[cell.machine.card].vram_bytes == largest


def test_the_paper_cells_are_the_largest_that_its_card_holds() -> None:
    kv_bytes_per_token = {
        "Mixtral-8x7B bf16": 32 * 2 * 1024 * 2,
        "DeepSeek-V2-Lite bf16": 27 * (512 + 64) * 2,
        "Qwen3-30B-A3B bf16": 48 * 2 * 512 * 2,
    }
    for name, residencies in PAPER_RESIDENCIES.items():
        model = MODELS[name]
        fixed_bytes = model.dense_bytes + 64 * 576 * kv_bytes_per_token[name] + RESERVE_BYTES
        holds = [
            share
            for share in RESIDENCIES
            if fixed_bytes + share * model.experts_bytes <= CARDS[PAPER_MACHINE.card].vram_bytes
        ]
        assert tuple(holds[-2:]) == residencies
    paper = [c for c in fixed_cells() if c.setting == "paper"]
    assert len(paper) == 2 * len(PAPER_RESIDENCIES) * len(PAPER_BATCHES)
    assert {(c.machine, c.phase) for c in paper} == {(PAPER_MACHINE, "decode")}


def test_quick_is_a_subset_with_every_model_batch_and_phase() -> None:
    quick = quick_cells(fixed_cells())
    assert set(quick) < set(fixed_cells())
    decode = {(c.model, c.batch) for c in quick if c.phase == "decode" and c.setting == "main"}
    assert len(decode) == len(MAIN_MODELS) * len(BATCHES) / 2
    assert {model for model, _ in decode} == set(MAIN_MODELS)
    assert {batch for _, batch in decode} == set(BATCHES)
    assert {c.model for c in quick if c.phase == "prefill"} == set(MAIN_MODELS)
    assert {c.machine.link for c in quick} == set(LINKS)
    assert {c.setting for c in quick} == {"main", "paper"}


def test_full_is_an_even_sample_of_the_whole_cross() -> None:
    full = [cell for cell in full_cells() if cell.setting == "main"]
    cross = len(machines()) * len(MAIN_MODELS) * len(RESIDENCIES) * len(BATCHES) * len(PHASES)
    assert 0.7 * cross / FULL_SHARE < len(full) < 1.1 * cross / FULL_SHARE
    assert {cell.machine for cell in full} == set(machines())
    assert all(cell.fits for cell in full)


def test_the_models_have_the_shapes_of_their_routing_statistics() -> None:
    for name, model in MODELS.items():
        statistics = STATISTICS[model.routing]
        shape = (statistics.layers, statistics.experts, statistics.top_k)
        assert (model.layers, model.experts, model.top_k) == shape, name
        assert 4.0 < model.weight_bits <= 16.0
        assert model.dense_bytes < model.experts_bytes


def random_passes(draw: random.Random, layers: int, experts: int) -> list[ForwardPass]:
    """Passes of random width and token counts, some of them prompts, guesses half right."""
    passes = []
    for _ in range(draw.randint(4, 14)):
        tokens = draw.choice((1, 1, 2, 40))
        wanted = [
            {
                e: draw.randint(1, tokens)
                for e in sorted(draw.sample(range(experts), draw.randint(1, experts)))
            }
            for _ in range(layers)
        ]

        def guess(layer: int, distance: int, wanted: list[dict[int, int]] = wanted) -> Prediction:
            likely = [e for e in wanted[layer] if draw.random() < 0.7] or [0]
            return Prediction.of(layer, distance, tuple(Guess(e, draw.random()) for e in likely))

        steps = tuple(
            LayerStep(
                demands,
                tuple(guess(layer + d, d) for d in (1, 2) if layer + d < layers),
                None if tokens < 40 else {e: float(n) for e, n in demands.items()},
            )
            for layer, demands in enumerate(wanted)
        )
        span, forwards = (40, 1) if tokens == 40 else (1, draw.randint(1, tokens))
        passes.append(ForwardPass(tokens, steps, (guess(0, 1),), span, forwards))
    return passes


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**9))
def test_nothing_beats_the_bound_on_random_cells(seed: int) -> None:
    draw = random.Random(seed)
    layers, experts = draw.randint(1, 4), draw.randint(2, 8)
    passes = random_passes(draw, layers, experts)
    warm = draw.randrange(len(passes))
    machine = Machine(
        draw.choice(tuple(CARDS)),
        draw.choice(tuple(LINKS)),
        draw.choice(tuple(CPUS)),
        draw.choice(HOST_LAYER_S),
    )
    profile = machine.profile(draw.choice((10**6, 10**8)), draw.choice((4.0, 16.0)))
    sizes = (draw.choice((10**5, 3 * 10**6, 10**8)),) * layers
    slots = draw.randint(experts, layers * experts)
    setup = PolicySetup((experts,) * layers, 1, sizes, slots, Costs.of(profile))
    least_s = bound_s(passes[warm:], profile, slots, sizes)
    policies = [make_policy(name, setup, **dict(s)) for name, all_ in TRIED for s in all_]
    for policy in (*policies, make_oracle(passes, setup)):
        run = simulate(passes, profile, policy, slots, sizes, 250_000, warm_passes=warm)
        assert run.measured_s >= least_s * (1 - 1e-9), (policy.name, run.measured_s, least_s)


def test_the_bound_is_reached_where_it_can_be() -> None:
    """All resident and no device work to speak of: host and dense time are all there is."""
    profile = MACHINES["rtx4090"].profile()
    passes = [ForwardPass(1, (LayerStep({0: 1}), LayerStep({1: 1})))] * 20
    setup = PolicySetup((2, 2), 1, (1000, 1000), 4, Costs.of(profile))
    run = simulate(
        passes, profile, make_policy("on-demand", setup), 4, (1000, 1000), 1000, warm_passes=2
    )
    least_s = bound_s(passes[2:], profile, 4, (1000, 1000))
    assert least_s == pytest.approx(run.measured_s, rel=1e-3)


def test_the_bound_falls_with_slots_and_with_either_rail() -> None:
    passes = random_passes(random.Random(3), 3, 8)
    sizes = (3_000_000,) * 3

    def least_s(slots: int, link: str, cpu: str) -> float:
        profile = Machine("rtx4090", link, cpu, 20e-6).profile()
        return bound_s(passes, profile, slots, sizes)

    by_slots = [least_s(slots, "pcie4x16", "cpu55") for slots in (4, 8, 16, 24)]
    assert by_slots == sorted(by_slots, reverse=True)
    assert by_slots[0] > by_slots[-1]
    assert least_s(8, "pcie3x4", "cpu55") > least_s(8, "pcie5x16", "cpu55")
    assert least_s(8, "pcie4x16", "cpu25") > least_s(8, "pcie4x16", "cpu75")


def test_moe_infinity_starts_with_what_other_chats_left_and_leaves_that_alone() -> None:
    collection = collected("OLMoE", 16)
    assert len(collection) == COLLECTED[16]
    layers, experts = collection.rows // 2, collection.experts
    prompts, decoding = (collection.entry(0)[part] for part in (slice(layers), slice(layers, None)))
    assert prompts.sum() == pytest.approx(layers)
    assert decoding.sum() == pytest.approx(layers)
    tracer = MoeInfinityTracer(layers, experts, collection=deepcopy(collection))
    tracer.begin_request()
    tracer.begin_pass(prompt=False)
    tracer.routed(0, dict.fromkeys(range(8), 1))
    assert tracer.matched() is not None
    tracer.end_request()
    assert len(tracer.collection) == len(collection) + 1


def test_slots_start_full_with_what_other_chats_used_most() -> None:
    popular = preloaded("OLMoE", 16, 100, by_layer=False)
    assert len(set(popular)) == 100
    entry = collected("OLMoE", 16).entry(0)
    kept = sum(entry[12 + layer, expert] for layer, expert in popular) / 12
    assert kept > 1.5 * 100 / (12 * 64)  # of its uses, more than chance would keep
    assert preloaded("OLMoE", 16, 70, by_layer=True) == [
        ExpertId(*divmod(number, 64)) for number in range(70)
    ]


def made(cell: Cell, speeds: dict[str, float], busy: float = 0.2) -> CellResults:
    """Results by hand: tokens/s by policy, all with the same share of a busy link."""
    causes = dict.fromkeys(
        ("on_demand", "prefetch_used", "prefetch_late", "prefetch_wasted", "cancelled", "cpu"), 1e6
    )
    results = {
        name: Result(name, {}, speed, 0.1, 0.0, 0.5, causes, busy, 0.3, speed / 100.0)
        for name, speed in speeds.items()
    }
    return CellResults(cell, 100.0, results)


SPEEDS = {"layer-stream": 2.0, "on-demand": 5.0, "hybrid": 8.0, "prescope": 10.0, "oracle": 12.5}
FAST = Machine("rtx5090", "pcie5x16", "cpu55", 20e-6)
SLOW = Machine("rtx4090", "pcie3x16", "cpu55", 20e-6)
CELL = Cell(FAST, MAIN_MODELS[0], 0.5, 1, "decode")


def test_the_summary_is_the_arithmetic_of_its_cells() -> None:
    model = MAIN_MODELS[0]
    cells = [
        made(Cell(FAST, model, 0.25, 1, "decode"), SPEEDS),
        made(Cell(FAST, model, 0.25, 4, "decode"), {**SPEEDS, "prescope": 16.0}, busy=0.6),
        made(Cell(SLOW, model, 0.25, 16, "decode"), {**SPEEDS, "prescope": 4.0}),
        made(Cell(FAST, model, 0.25, 1, "prefill"), {**SPEEDS, "prescope": 7.9}),
        made(Cell(FAST, model, 0.25, 64, "decode", "paper"), {**SPEEDS, "prescope": 8.0}),
    ]
    figures = summary(cells)
    ratios = (10 / 8, 16 / 8, 4 / 8, 8 / 8)
    assert figures["decode_geomean_vs_best_rival"] == pytest.approx(math.prod(ratios) ** 0.25)
    # Slack: the link idle most of the time, and at least 0.4 of the CPU's rate.
    assert figures["link_slack_cells"] == 2
    slack = figures["decode_geomean_vs_best_rival_link_slack"]
    assert slack == pytest.approx(math.sqrt(1.25 * 1.0))
    assert figures["prefill_min_vs_best_rival"] == pytest.approx(7.9 / 8)
    assert figures["min_vs_best_rival"] == pytest.approx(0.5)
    assert figures["cells_below_0.98"] == 1 + 0
    assert figures["decode_geomean_vs_on_demand"] == pytest.approx(
        math.prod((10 / 5, 16 / 5, 4 / 5, 8 / 5)) ** 0.25
    )
    assert figures["decode_geomean_vs_oracle"] == pytest.approx(
        math.prod((10 / 12.5, 16 / 12.5, 4 / 12.5, 8 / 12.5)) ** 0.25
    )
    assert figures["throughput_vs_layer_stream_paper_setting"] == pytest.approx(4.0)
    assert figures["latency_cut_paper_setting"] == pytest.approx(0.75)
    met = {target["figure"]: target["met"] for target in targets(figures)}
    assert met["min_vs_best_rival"] is False
    assert met["latency_cut_paper_setting"] is True
    assert met["prefill_min_vs_best_rival"] is True
    nothing = targets(summary(cells[3:4]))
    assert {t["figure"] for t in nothing if t["met"] is None} >= {"decode_geomean_vs_oracle"}


def test_a_rival_is_compared_with_the_others_and_the_oracle_with_rivals() -> None:
    told = {row["policy"]: row for row in rows([made(CELL, SPEEDS)])}
    assert told["prescope"]["ratio_to_best_rival"] == pytest.approx(10 / 8)
    assert told["hybrid"]["ratio_to_best_rival"] == pytest.approx(8 / 5)
    assert told["on-demand"]["ratio_to_best_rival"] == pytest.approx(5 / 8)
    assert told["oracle"]["ratio_to_best_rival"] == pytest.approx(12.5 / 8)
    assert told["prescope"]["ratio_to_oracle"] == pytest.approx(0.8)
    assert told["prescope"]["ratio_to_bound"] == pytest.approx(0.1)


NAMED_BY_THE_ISSUE = {
    "machine",
    "model",
    "residency",
    "batch",
    "phase",
    "policy",
    "tokens_per_s",
    "stall_s",
    "hit_rate",
    "bytes_by_cause",
    "ratio_to_oracle",
    "ratio_to_best_rival",
    "ratio_to_bound",
}
SUMMARISED = {
    "decode_geomean_vs_best_rival",
    "decode_geomean_vs_best_rival_link_slack",
    "prefill_min_vs_best_rival",
    "min_vs_best_rival",
    "decode_geomean_vs_oracle",
    "decode_geomean_vs_on_demand",
    "throughput_vs_layer_stream_paper_setting",
    "latency_cut_paper_setting",
}


def bench(capfd: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", "policies", "--quick", "--json", *arguments]) == 0
    result: dict[str, Any] = json.loads(capfd.readouterr().out)
    return result


def test_two_quick_cells_run_end_to_end_whatever_the_processes(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "policies.png"
    alone = bench(capfd, "--cells", "2", "--jobs", "1", "--plot", str(picture))
    assert bench(capfd, "--cells", "2", "--jobs", "2") == alone
    policies = {*RIVALS, "prescope", "oracle"}
    assert len(alone["cells"]) == 2 * len(policies)
    assert {row["policy"] for row in alone["cells"]} == policies
    for row in alone["cells"]:
        assert set(row) >= NAMED_BY_THE_ISSUE
        assert 0.0 < row["ratio_to_bound"] <= 1.0
        assert row["tokens_per_s"] > 0.0
    assert set(alone["summary"]) >= SUMMARISED
    assert [t["figure"] for t in alone["targets"]] == [t.figure for t in TARGETS]
    text = tell(alone)
    assert "min_vs_best_rival" in text
    assert all(policy in text for policy in policies)
    with Image.open(picture) as image:
        assert image.size[0] == 1600
        assert len(image.getcolors(10**6) or ()) > 10


def test_an_ablation_compares_the_policy_with_itself(capfd: pytest.CaptureFixture[str]) -> None:
    result = bench(capfd, "--cells", "1", "--jobs", "1", "--ablate")
    assert set(result["ablation"]) == set(ABLATIONS)
    for part in result["ablation"].values():
        assert 0.0 < part["min"] <= part["max"]
        assert part["decode_geomean"] or part["prefill_geomean"]
    assert all(name in tell(result) for name in ABLATIONS)


def test_another_seed_gives_other_chats_and_the_same_seed_the_same() -> None:
    cell = fixed_cells()[0]
    first, again, other = (session_of(cell, seed) for seed in (0, 0, 1))
    assert first == again
    assert first.passes != other.passes
    assert len(first.passes) == len(other.passes)
    assert preloaded("OLMoE", 16, 100, by_layer=False, seed=1) != preloaded(
        "OLMoE", 16, 100, by_layer=False
    )


def test_planning_is_timed_for_each_model_at_one_and_many_requests(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies_planning, "MAIN_MODELS", ("Mixtral-8x7B 4-bit",))
    monkeypatch.setattr(policies_planning, "BATCHES", (1, 64))
    monkeypatch.setattr(policies_planning, "PAPER_MATCH_US", {50: 21.0})
    assert main(["bench", "policies", "--planning", "--json"]) == 0
    result = json.loads(capfd.readouterr().out)
    rows = result["planning"]["rows"]
    assert {(row["batch"], row["policy"]) for row in rows} == {
        (batch, policy) for batch in (1, 64) for policy in ALL_POLICIES
    }
    assert all(row["us_per_layer"] > 0 and row["layers_timed"] > 100 for row in rows)
    lines = result["planning"]["policies"]
    for row in rows:
        fitted = Deciding.from_json(lines[row["policy"]]).routed.seconds(row["routed_experts"])
        assert 0.2 < fitted * 1e6 / row["routed_us"] < 5.0
    assert result["planning"]["moe_infinity_match_us"]["50"] > 0.0
    assert "Mixtral" in tell(result)


def test_charged_planning_slows_policies_by_what_was_measured() -> None:
    cell = next(c for c in by_hash(fixed_cells()) if (c.model, c.batch) == ("gpt-oss-20b", 1))
    free, charged = (run_cell(cell, charge_planning=charge).results for charge in (False, True))
    assert set(planning_costs()) == set(free) == set(ALL_POLICIES)
    layers = MODELS[cell.model].layers
    for name, deciding in planning_costs().items():
        more_s = charged[name].pass_s - free[name].pass_s
        if name in ("prescope", "oracle", "moe-infinity"):
            # Other moments, other copies ahead: these may be luckier ones.
            assert more_s > -0.02 * free[name].pass_s, name
        else:
            assert more_s > 0.5 * layers * deciding.routed.base_s, name


def test_a_policy_that_beats_the_bound_stops_the_bench(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies_measure, "bound_s", lambda *given: 1e6)
    assert main(["bench", "policies", "--quick", "--cells", "1", "--jobs", "1", "--json"]) == 1
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["type"] == "BoundError"
    assert "layer-stream" in error["message"]


def test_the_live_bench_answers_several_at_a_time_in_modelled_time(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies_live, "POLICIES", ("prescope", "hybrid", "on-demand"))
    monkeypatch.setattr(policies_live, "BATCHES", (1, 3))
    monkeypatch.setattr(policies_live, "QUESTIONS", policies_live.QUESTIONS[:3])
    monkeypatch.setattr(policies_live, "NEW_TOKENS", 8)
    monkeypatch.setattr(policies_live, "WARM_QUESTIONS", 1)
    result = bench(capfd, "--live")
    told = {(row["batch"], row["policy"]): row for row in result["live"]}
    assert set(told) == {
        (batch, name) for batch in (1, 3) for name in ("prescope", "hybrid", "on-demand")
    }
    for (batch, _), row in told.items():
        assert row["emulated"]
        assert row["tokens_per_pass"] == batch
        assert row["tokens_per_s"] > 0
    for batch in (1, 3):
        rivals = [told[batch, name] for name in ("hybrid", "on-demand")]
        assert max(row["ratio_to_best_rival"] for row in rivals) == 1.0
        # Misses cost more over this link than on this CPU.
        assert rivals[0]["tokens_per_s"] > rivals[1]["tokens_per_s"]
    assert "emulated" in tell(result)
