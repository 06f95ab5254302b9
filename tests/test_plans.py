"""Labels of models come from a child in the background, are kept, and hold for what they say."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.plans import ModelPlans, arguments_for, ask_child, label_of
from app.settings import SettingsStore

SPEED = {"tokens_per_s": 31.4}
MACHINE = {"device_name": "Card", "vram_total_bytes": 8, "ram_total_bytes": 9}
CARD = {"vram_total_bytes": 16}


def answer(slots: int = 576, ram_experts: int | None = None, fits: bool = True) -> dict[str, Any]:
    if not fits:
        return {
            "fits": False,
            "why": "qwen needs at least 4.66 GiB of device memory, but the budget is 4.00 GiB:"
            " 2.92 GiB dense weights.",
            "next_step": "Free more.",
        }
    plan = {"slots": slots, "ram_experts": ram_experts}
    shape = {"experts": [128] * 48}
    return {"fits": True, "plan": plan, "shape": shape, "experts": 6144, "speed": SPEED}


@pytest.mark.parametrize(
    ("said", "label"),
    [
        (answer(), "fits: 12 of 128 experts/layer on the card, about 31 tok/s (modelled)"),
        (answer(6144), "fits: all experts on the card, about 31 tok/s (modelled)"),
        (answer(0), "fits, without a card: about 31 tok/s (modelled)"),
        (answer(100, 3000), "needs the disk: about 31 tok/s (modelled)"),
        (
            answer(fits=False),
            "does not fit: qwen needs at least 4.66 GiB of device memory, but the budget is"
            " 4.00 GiB",
        ),
        (
            {"error": {"type": "X", "message": "dbrx models cannot be run: its experts share."}},
            "cannot be loaded: dbrx models cannot be run",
        ),
        ({}, ""),
        ({"unmeasured": True}, ""),
    ],
)
def test_an_answer_becomes_a_few_words(said: dict[str, Any], label: str) -> None:
    assert label_of(said) == label


def test_slow_models_keep_a_second_digit() -> None:
    slow = answer(100, 3000) | {"speed": {"tokens_per_s": 2.666}}
    assert label_of(slow) == "needs the disk: about 2.7 tok/s (modelled)"


class Asked:
    """Answers like the child, when it is let."""

    def __init__(self) -> None:
        self.arguments: list[list[str]] = []
        self.free = threading.Event()
        self.free.set()

    def __call__(self, arguments: Sequence[str]) -> dict[str, Any]:
        self.arguments.append(list(arguments))
        assert self.free.wait(10)
        return answer()


def until(said: Callable[[], str]) -> str:
    deadline_s = time.monotonic() + 10
    while not (label := said()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return label


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"x")
    return made


def test_the_page_does_not_wait_and_every_question_is_asked_once(
    tmp_path: Path, folder: Path
) -> None:
    asked = Asked()
    asked.free.clear()
    plans = ModelPlans(tmp_path, SettingsStore(tmp_path), asked)
    assert [plans.label(str(folder)) for _ in range(5)] == [""] * 5
    asked.free.set()
    assert until(lambda: plans.label(str(folder))).startswith("fits: 12 of 128")
    assert len(asked.arguments) == 1
    plans.close()


def test_answers_outlive_the_app_until_what_they_hold_for_changes(
    tmp_path: Path, folder: Path
) -> None:
    store = SettingsStore(tmp_path)
    first = ModelPlans(tmp_path, store, Asked())
    assert until(lambda: first.label(str(folder)))
    first.close()
    deadline_s = time.monotonic() + 10
    while not (tmp_path / "plans.json").exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    asked = Asked()
    again = ModelPlans(tmp_path, store, asked)
    assert again.label(str(folder)).startswith("fits")
    assert not asked.arguments
    changes: list[Callable[[], object]] = [
        lambda: os.utime(folder / "model.safetensors", (1, 1)),
        lambda: (folder / "config.json").write_text("{ }"),
        lambda: (tmp_path / "machine.json").write_text(json.dumps(MACHINE)),
        lambda: (tmp_path / "machine.json").write_text(json.dumps(MACHINE | CARD)),
        lambda: store.update(vram_bytes=8 * 2**30),
        lambda: store.update(experts="int4"),
    ]
    for number, change in enumerate(changes, 1):
        change()
        assert again.label(str(folder)) == ""
        assert until(lambda: again.label(str(folder)))
        assert len(asked.arguments) == number
    (folder / "notes.txt").write_text("not the model's")
    assert again.label(str(folder))
    (tmp_path / "machine.json").write_text(json.dumps(MACHINE | CARD | {"vram_free_bytes": 1}))
    assert again.label(str(folder)), "written anew at every load"
    again.close()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema": 9, "plans": {}}', '{"schema": 1}'])
def test_a_damaged_file_of_answers_is_asked_again(
    tmp_path: Path, folder: Path, content: str
) -> None:
    (tmp_path / "plans.json").write_text(content)
    plans = ModelPlans(tmp_path, SettingsStore(tmp_path), Asked())
    assert until(lambda: plans.label(str(folder)))
    plans.close()


def test_nothing_is_asked_after_the_end(tmp_path: Path, folder: Path) -> None:
    asked = Asked()
    plans = ModelPlans(tmp_path, SettingsStore(tmp_path), asked)
    plans.close()
    assert plans.label(str(folder)) == ""
    assert not asked.arguments


def test_a_child_that_failed_is_asked_again_at_the_next_start(tmp_path: Path, folder: Path) -> None:
    failed = threading.Event()

    def fail(arguments: Sequence[str]) -> dict[str, Any]:
        failed.set()
        return {}

    store = SettingsStore(tmp_path)
    first = ModelPlans(tmp_path, store, fail)
    assert first.label(str(folder)) == ""
    assert failed.wait(10)
    first.close()
    assert first._thread is not None
    first._thread.join(10)
    assert first.label(str(folder)) == ""
    again = ModelPlans(tmp_path, store, Asked())
    assert until(lambda: again.label(str(folder)))
    again.close()


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_no_child_outlives_the_app(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("app.plans.sys.executable", str(slow))
    plans = ModelPlans(tmp_path, SettingsStore(tmp_path))
    assert plans.label(str(folder)) == ""
    deadline_s = time.monotonic() + 10
    while plans._child is None and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert plans._child is not None
    plans.close()
    assert plans._child.wait(10) < 0
    assert plans._thread is not None
    plans._thread.join(10)
    assert not plans._thread.is_alive()
    assert not (tmp_path / "plans.json").exists()


def test_the_settings_reach_the_question(tmp_path: Path) -> None:
    store = SettingsStore(tmp_path)
    settings = store.update(policy="hybrid", cache_fraction=0.5, vram_bytes=10**10, experts="int8")
    arguments = arguments_for("/m", settings)
    assert arguments[:4] == ["plan", "/m", "--json", "--unloaded"]
    for pair in (["--policy", "hybrid"], ["--cache-fraction", "0.5"], ["--experts", "int8"]):
        assert pair == arguments[arguments.index(pair[0]) :][:2]


@pytest.mark.alone
def test_the_child_answers_for_a_config_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At low priority, other tests' processes would leave it next to nothing of the machine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 8,
        "vocab_size": 100,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked = [*arguments_for(str(tmp_path), SettingsStore(tmp_path).current())]
    said = ask_child([*asked, "--data-dir", str(tmp_path)])
    assert said["fits"] is True
    assert label_of(said).startswith("fits")
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be loaded" in label_of(ask_child(asked))


def test_a_child_that_fails_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.plans.sys.executable", "/no/such/python")
    assert ask_child(["plan", "x"]) == {}
