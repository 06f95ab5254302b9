"""The shipped model is the reported one, answers as reported, and never saw its exam."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
import torch

from assets.training import corpus, evaluate, items, memory

MODEL = Path(__file__).parent.parent / "assets" / "default_model"
SIZE_LIMIT_BYTES = 25_000_000
FILES = (
    "MODEL_CARD.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "report.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def report() -> dict:
    return json.loads((MODEL / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield evaluate.load(MODEL)
    torch.set_num_threads(threads)


def test_the_folder_is_complete_and_small():
    assert not [name for name in FILES if not (MODEL / name).is_file()]
    assert sum(path.stat().st_size for path in MODEL.iterdir()) <= SIZE_LIMIT_BYTES


def test_the_report_is_about_these_weights(report):
    weights = (MODEL / report["weights"]["file"]).read_bytes()
    assert hashlib.sha256(weights).hexdigest() == report["weights"]["sha256"]


def test_the_report_meets_the_bar(report):
    scores = report["evaluation"]
    assert scores["asked"] >= 400
    assert scores["exact"] >= 0.8
    shares = {name: row["right"] / row["asked"] for name, row in scores["classes"].items()}
    assert not {name: share for name, share in shares.items() if share < 0.5}
    assert scores["right"] == sum(row["right"] for row in scores["classes"].values())


def test_the_routers_are_neither_skewed_nor_uniform(report):
    routing = report["routing"]
    for layer in routing["layers"]:
        assert 0.5 <= layer["effective_experts"] / routing["experts"] <= 0.85, layer
        assert layer["smallest_share"] > 0, layer
    chance = routing["top_k"] / routing["experts"]
    assert routing["mean_reuse_previous_token"] >= 1.5 * chance


def test_a_sample_of_the_exam_scores_as_reported(loaded, report):
    # The report keeps one digit per question; a swapped or damaged model cannot match them.
    outcomes = evaluate.ask_all(*loaded, evaluate.questions(2))
    reported = {name: row["outcomes"] for name, row in report["evaluation"]["classes"].items()}
    assert len(outcomes) >= 24
    seen: dict[str, int] = {}
    different = []
    for outcome in outcomes:
        position = seen.get(outcome.group, 0)
        seen[outcome.group] = position + 1
        if reported[outcome.group][position] != str(int(outcome.right)):
            different.append((outcome.item.question, outcome.answer))
    # Another CPU may round one near-tie the other way.
    assert len(different) <= 2, different


def test_the_template_takes_ordinary_message_lists(loaded):
    _, tokenizer = loaded
    hello = {"role": "user", "content": "Hello"}
    parts = {"role": "user", "content": [{"type": "text", "text": "Hello"}]}
    system = {"role": "system", "content": "Be kind."}
    answer = {"role": "assistant", "content": "Hi!"}
    for chat in ([hello], [system, hello], [system, system, hello], [hello, answer, hello]):
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text.endswith("<|im_start|>assistant\n")
    plain, listed = (
        tokenizer.apply_chat_template([m], tokenize=False, add_generation_prompt=True)
        for m in (hello, parts)
    )
    assert plain == listed


def test_training_never_draws_a_held_out_key(monkeypatch):
    used = []
    draw, draw_memory = corpus.draw, memory.draw_memory
    monkeypatch.setattr(corpus, "draw", lambda *a, **k: used.append(draw(*a, **k)) or used[-1])
    monkeypatch.setattr(
        corpus, "draw_memory", lambda *a, **k: used.append(draw_memory(*a, **k)) or used[-1]
    )
    rng = random.Random(5)
    for _ in range(3000):
        corpus.dialog(rng)
    assert len(used) > 5000
    assert not [drawn.key for drawn in used if items.is_held_out(drawn.key)]


def test_the_exam_asks_only_held_out_keys_and_none_twice():
    asked = evaluate.questions(30)
    assert all(items.is_held_out(item.key) for _, item in asked)
    assert len({item.key for _, item in asked}) == len(asked)


def test_the_corpus_is_a_function_of_its_seed():
    def chats(seed: int) -> list:
        rng = random.Random(seed)
        return [corpus.dialog(rng) for _ in range(200)]

    assert chats(3) == chats(3)
    assert chats(3) != chats(4)
