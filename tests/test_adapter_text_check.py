"""Strangers' tokenizers: opened elsewhere first, so that a bad one ends nothing of ours."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from runtime.adapter_text import MAX_TOKENIZER_BYTES, TOKENIZER_NAME, open_tokenizer
from runtime.adapter_text_check import check_tokenizer
from runtime.config import DEFAULT_MODEL_DIR
from runtime.errors import ModelFilesError


def tokenizer(
    pre_tokenizer: Any = None, normalizer: Any = None, vocabulary: Any = None
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary or {"a": 0, "b": 1},
            "merges": [],
        },
    }


def split(expression: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": expression},
        "behavior": "Isolated",
        "invert": False,
    }


GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
HOSTILE: dict[str, tuple[Any, str]] = {
    "an expression that backtracks for ever": (tokenizer(split("(a+)+$")), "retry-limit"),
    "an expression that is none": (tokenizer(split("(")), "parenthesis"),
    "repeated too often": (tokenizer(split("a{99999}{99999}")), "repeat"),
    "nested too deeply": (tokenizer(split("(" * 5000 + "a" + ")" * 5000)), "depth"),
    "a text that grows to terabytes": (
        tokenizer(None, {"type": "Sequence", "normalizers": [GROWING] * 4}),
        "more than 2 s of computing or 4 GiB",
    ),
    "an unknown part": (tokenizer({"type": "Evil"}), "PreTokenizer"),
    "a list": ([1, 2], "damaged"),
    "a vocabulary of lists": (tokenizer(vocabulary={"a": [0]}), "damaged"),
    "negative ids": (tokenizer(vocabulary={"a": -1}), "damaged"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_tokenizer_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, named = HOSTILE[case]
    path = tmp_path / TOKENIZER_NAME
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelFilesError, match=TOKENIZER_NAME) as refused:
        check_tokenizer(path, cpu_s=2.0)
    assert named in refused.value.message
    assert refused.value.next_step


def test_one_that_only_waits_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.adapter_text_check.CHILD", "import time; time.sleep(60)")
    began_s = time.monotonic()
    with pytest.raises(ModelFilesError, match="within 0 s"):
        check_tokenizer(tmp_path / TOKENIZER_NAME, deadline_s=0.2)
    assert time.monotonic() - began_s < 20


def test_honest_ones_pass() -> None:
    check_tokenizer(DEFAULT_MODEL_DIR / TOKENIZER_NAME)
    assert open_tokenizer(DEFAULT_MODEL_DIR, 10**6) is not None


def test_a_file_of_gigabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / TOKENIZER_NAME
    path.write_bytes(b"{")
    os.truncate(path, MAX_TOKENIZER_BYTES + 1)  # a hole: nothing is written
    with pytest.raises(ModelFilesError, match=str(MAX_TOKENIZER_BYTES + 1)):
        open_tokenizer(tmp_path, 100)


def test_ids_beyond_the_embedding_are_refused_with_both_numbers(tmp_path: Path) -> None:
    content = tokenizer(vocabulary={"a": 0, "b": 500})
    (tmp_path / TOKENIZER_NAME).write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelFilesError, match=r"500.*\b100\b"):
        open_tokenizer(tmp_path, 100)
