"""The bench of forms: small, but with everything that it reports."""

from __future__ import annotations

import argparse
from typing import Any

import pytest
import torch

from runtime.bench import SUITES, formats, formats_quality
from runtime.formats import Form


@pytest.fixture(scope="module")
def result() -> Any:
    patch = pytest.MonkeyPatch()
    patch.setattr(formats, "HIDDEN", 256)
    patch.setattr(formats, "INNER", 128)
    patch.setattr(formats, "TOKENS", (1, 3))
    patch.setattr(formats, "POOL_BYTES", 2**20)
    patch.setattr(formats_quality, "CHATS_USED", 12)
    try:
        return formats.run(argparse.Namespace(model="default"), lambda text: None)
    finally:
        patch.undo()


def test_every_form_is_timed_and_close_to_its_reference(result: Any) -> None:
    assert set(result["forms"]) == {*formats.FORMS, *formats.PLAIN}
    for name, form in result["forms"].items():
        assert all(ratio > 0 for ratio in form["time_ratio"].values())
        assert form["relative_error"] < 0.02, name
    assert result["forms"]["bfloat16"]["time_ratio"] == {"1": 1.0, "3": 1.0}
    assert result["forms"]["int4, groups of 64"]["relative_error"] > 1e-4, "bfloat16 rounds"
    assert 0.27 < result["forms"]["int4, groups of 64"]["bytes_ratio"] < 0.29
    assert result["forms"]["mxfp4"]["few_tokens"] is not None


def test_quality_gets_worse_with_fewer_bits_and_is_perfect_without(result: Any) -> None:
    quality = result["quality"]["experts"]
    assert result["quality"]["chats"] > 5
    assert quality["as they are"]["mean_kl"] == 0.0
    assert quality["as they are"]["same_tokens"] == 1.0
    assert quality["as they are"]["exact_match"] > 0.5, "the default model knows its answers"
    assert 0 < quality["int8"]["mean_kl"] < quality["int4"]["mean_kl"] < 0.05
    assert quality["int8"]["same_tokens"] > 0.98
    assert 0.5 < quality["int8"]["bytes_ratio"] < 0.55
    assert 0.27 < quality["int4"]["bytes_ratio"] < 0.30


def test_a_wrong_quantiser_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = formats_quality.quantise

    def careless(matrix: torch.Tensor, form: Form) -> Any:
        codes = real(matrix, form)
        codes.codes[:, ::7] = 0
        return codes

    monkeypatch.setattr(formats_quality, "quantise", careless)
    monkeypatch.setattr(formats_quality, "CHATS_USED", 6)
    monkeypatch.setattr(formats_quality, "QUANTISED", {"int8": "int8"})
    figures = formats_quality.quality_of_experts(
        formats.model_folder("default"), formats._chats(), lambda text: None
    )
    assert figures["experts"]["int8"]["mean_kl"] > 0.01


def test_the_suite_is_listed_and_told(result: Any) -> None:
    assert "formats" in SUITES
    text = formats.tell(result)
    assert "int8, rows" in text
    assert "mean KL" in text
