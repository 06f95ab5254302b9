"""What limits speed now: the right cause, with its numbers, and never measured when emulated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import panel
from app.panel import limit, shown_name
from runtime.core import EngineStatus, LoadProgress, TelemetrySnapshot

READY = EngineStatus(state="ready", model="m")
RUNNING = TelemetrySnapshot(
    sequence=1,
    emulated=False,
    device="card",
    model="m",
    policy="hybrid",
    generating=True,
    tokens_per_s=10.0,
    ttft_s=0.5,
    served=(60, 0, 0, 30, 10),
    hit_rate=0.6,
    link_bytes_per_s=9e9,
    link_max_bytes_per_s=12e9,
    link_bytes_total=0,
    stall_s_per_token=0.06,
    token_s=0.1,
    cpu_s_per_token=0.01,
    vram_used_bytes=0,
    vram_budget_bytes=0,
    ram_used_bytes=0,
    ram_total_bytes=0,
    cache_slots=48,
    cache_slots_used=48,
    layers=4,
    experts=32,
    heat="",
)


@pytest.mark.parametrize(
    ("status", "snapshot", "cause", "words"),
    [
        (EngineStatus(state="starting"), None, "starting", "The engine is starting"),
        (EngineStatus(state="empty"), None, "empty", "No model is loaded"),
        (READY, None, "empty", "No model is loaded"),
        (EngineStatus(state="restarting", model="m"), RUNNING, "restarting", "started again"),
        (EngineStatus(state="dead", next_step="Do this."), None, "dead", "could not be started"),
        (
            EngineStatus(state="loading", loading="big", progress=LoadProgress("Reading", 25, 100)),
            None,
            "loading",
            "Loading big 25 %: Reading",
        ),
        (EngineStatus(state="loading", loading="big"), None, "loading", "Loading big"),
        (READY, replace(RUNNING, generating=False), "idle", "Nothing is running"),
        (READY, replace(RUNNING, token_s=0.0), "prompt", "The prompt is being read"),
        (
            READY,
            RUNNING,
            "link",
            "copied takes 60 % of a token's 100 ms; the link runs at 75 % of 12.0 GB/s",
        ),
        (
            READY,
            replace(RUNNING, stall_s_per_token=0.02, cpu_s_per_token=0.05),
            "cpu",
            "on the CPU take 50 % of a token's 100 ms",
        ),
        (
            READY,
            replace(RUNNING, stall_s_per_token=0.01, cpu_s_per_token=0.01),
            "device",
            "take 80 % of a token's 100 ms; 60 % of the experts were in place",
        ),
        (
            READY,
            replace(RUNNING, token_s=2.0, stall_s_per_token=1.5, link_max_bytes_per_s=0.0),
            "link",
            "75 % of a token's 2.0 s.",
        ),
    ],
)
def test_the_cause_and_its_numbers(
    status: EngineStatus, snapshot: TelemetrySnapshot | None, cause: str, words: str
) -> None:
    found = limit(status, snapshot)
    assert found.cause == cause
    assert words in found.text
    assert found.advice


CACHE = "48 of 128 experts fit in the cache and 60 % of the uses hit it"
ALL_FIT = "All experts will be in place soon"
ON_CPU = {"stall_s_per_token": 0.0, "cpu_s_per_token": 0.09}
REACTIVE = ("hybrid", "on-demand")
PREDICTIVE = ("prescope", *REACTIVE)


@pytest.mark.parametrize(
    ("changes", "policies", "words"),
    [
        ({"policy": "hybrid"}, REACTIVE, CACHE),
        ({"policy": "hybrid"}, PREDICTIVE, "The policy PreScope also copies experts ahead"),
        ({"policy": "hybrid", **ON_CPU}, PREDICTIVE, CACHE),
        ({"policy": "hybrid", "cache_slots": 128}, PREDICTIVE, ALL_FIT),
        ({"policy": "on-demand"}, REACTIVE, "The policy Hybrid splits the misses"),
        ({"policy": "on-demand"}, PREDICTIVE, "The policy PreScope splits the misses"),
        ({"policy": "static-split", **ON_CPU}, PREDICTIVE, "The policy PreScope splits"),
        ({"policy": "cpu-only", **ON_CPU}, PREDICTIVE, "Every expert runs on the CPU"),
        ({"policy": "prescope"}, PREDICTIVE, CACHE),
        ({"policy": "prescope", "cache_slots": 128}, PREDICTIVE, ALL_FIT),
        (
            {"policy": "prescope", "prefetch_bytes_per_token": (1.0, 9.0, 2.0)},
            PREDICTIVE,
            "comes late: the link is full",
        ),
        (
            {"policy": "prescope", "prefetch_bytes_per_token": (1.0, 2.0, 9.0)},
            PREDICTIVE,
            "goes unused",
        ),
        (
            {"policy": "prescope", "prefetch_bytes_per_token": (9.0, 2.0, 1.0)},
            PREDICTIVE,
            CACHE,
        ),
    ],
)
def test_the_advice_fits_the_policy_and_the_cache(
    changes: dict[str, Any], policies: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panel, "POLICIES", policies)
    assert words in limit(READY, replace(RUNNING, **changes)).advice


def test_waiting_for_the_link_with_prediction_off_names_the_switch() -> None:
    waiting = replace(RUNNING, policy="prescope")
    assert "Prediction is off" in limit(READY, waiting, prediction=False).advice
    assert "Prediction" not in limit(READY, waiting, prediction=True).advice
    reactive = replace(RUNNING, policy="on-demand")
    assert "Prediction" not in limit(READY, reactive, prediction=False).advice


def test_a_load_under_way_says_who_answers_meanwhile() -> None:
    switching = EngineStatus(state="loading", model="old", loading="new")
    assert limit(switching, RUNNING).advice == "old answers until then."


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("default", "the built-in model"),
        ("/home/me/models/OLMoE/", "OLMoE"),
        ("C:\\models\\Qwen3 30B", "Qwen3 30B"),
        ("/c/hub/models--openai--gpt-oss-120b/snapshots/0123abcd", "openai/gpt-oss-120b"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_models_are_called_by_name(model: str, name: str) -> None:
    assert shown_name(model) == name


shares = st.floats(0, 10, allow_nan=False)


@given(shares, shares, shares, st.booleans(), st.floats(0, 1), st.floats(0, 1e12))
def test_any_figures_give_one_sentence_and_say_emulated(
    token_s: float, stall_s: float, cpu_s: float, emulated: bool, hits: float, rate: float
) -> None:
    found = limit(
        READY,
        replace(
            RUNNING,
            token_s=token_s,
            stall_s_per_token=stall_s,
            cpu_s_per_token=cpu_s,
            emulated=emulated,
            hit_rate=hits,
            link_bytes_per_s=rate,
        ),
    )
    assert found.cause in ("link", "cpu", "device", "prompt")
    assert ("mulated" in found.text) == emulated
    assert found.text.endswith(".")
    assert "nan" not in found.text
    shown = [int(word) for word in found.text.replace("%", " % ").split() if word.isdecimal()]
    assert all(number <= 1000 for number in shown)
