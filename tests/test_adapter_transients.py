"""What a plan sets aside for a pass is what the family's own code really takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from runtime.adapter import find_moe_layers
from runtime.adapter_config import build_skeleton
from runtime.adapter_shape import model_shape
from runtime.adapter_transients import LiveBytes, estimated, fitted, peak_bytes, transients_of
from runtime.core import Transients
from tests.families import tiny

WIDE = {"num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 4096}
SIZES = [(8, 700), (64, 1500), (200, 3000), (512, 4000)]


def skeleton_of(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    return build_skeleton(tiny(family, **extra), dtype)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "mixtral", "olmoe", "glm4_moe"])
def test_a_pass_of_any_size_stays_within_its_transients(family: str) -> None:
    skeleton = skeleton_of(family, torch.bfloat16, **WIDE)
    transients = transients_of(skeleton, find_moe_layers(skeleton, torch.bfloat16))
    for tokens, context in SIZES:
        peak = peak_with_experts(skeleton, tokens, context)
        planned = transients.size_bytes(tokens, context)
        assert peak <= planned * 1.02
        assert planned <= 1.5 * peak


def peak_with_experts(skeleton: Any, tokens: int, context: int) -> int:
    """Measure one size with the whole model, its experts' own rows left out."""
    from runtime.adapter import attach, detach

    layers = find_moe_layers(skeleton, skeleton.dtype)
    attach(layers, lambda layer, hidden, index, weights: torch.empty_like(hidden))
    try:
        return peak_bytes(skeleton, tokens, context)
    finally:
        detach(layers)


def test_only_an_attention_that_keeps_its_scores_pays_for_pairs() -> None:
    def pair_bytes(family: str) -> int:
        skeleton = skeleton_of(family, torch.bfloat16, **WIDE)
        return transients_of(skeleton, find_moe_layers(skeleton, torch.bfloat16)).pair_bytes

    assert pair_bytes("qwen3_moe") <= 4
    assert pair_bytes("gpt_oss") >= 16 * 2 * 2


def test_shapes_foretell_what_real_tensors_take() -> None:
    """The same family, eager attention, on the CPU: memory that is really allocated."""
    skeleton = skeleton_of("gpt_oss", **WIDE)
    layers = find_moe_layers(skeleton, torch.float32)
    planned = transients_of(skeleton, layers)
    real = type(skeleton)(tiny("gpt_oss", **WIDE)).eval()
    ids = torch.zeros((1, 900), dtype=torch.int64)
    live = LiveBytes()
    with torch.no_grad():
        past = None
        for begin in range(0, 768, 256):
            past = real(ids[:, begin : begin + 256], past_key_values=past).past_key_values
        with live:
            output = real(ids[:, 768:], past_key_values=past, logits_to_keep=1)
    assert output.logits.shape[1] == 1
    assert live.peak_bytes <= planned.size_bytes(132, 900) * 1.1
    assert live.peak_bytes >= planned.size_bytes(132, 900) * 0.5


def test_live_bytes_count_what_is_alive_once() -> None:
    with LiveBytes() as live:
        one = torch.zeros(1000, dtype=torch.uint8)
        view = one.view(10, 100)[2:]
        two = torch.ones(500, dtype=torch.uint8)
        assert live.live_bytes == 1500
        del one
        assert live.live_bytes == 1500  # the view holds on to it
        del view, two
        assert (live.live_bytes, live.peak_bytes) == (0, 1500)


def test_the_fit_covers_every_peak_whatever_they_are() -> None:
    exact = Transients(700, 30, 5, 9)
    sizes = [(128, 2048), (512, 2048), (128, 8192), (512, 8192)]
    assert fitted({size: exact.size_bytes(*size) for size in sizes}) == exact
    odd = {(128, 2048): 10**6, (512, 2048): 5, (128, 8192): 10**7, (512, 8192): 10**5}
    for size, peak in odd.items():
        assert fitted(odd).size_bytes(*size) >= peak


def test_a_family_that_does_not_run_on_shapes_gets_a_generous_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skeleton = skeleton_of("qwen3_moe", **WIDE)
    layers = find_moe_layers(skeleton, torch.float32)
    measured = transients_of(skeleton, layers)
    monkeypatch.setattr(
        "runtime.adapter_transients.peak_bytes", lambda *_: (_ for _ in ()).throw(RuntimeError)
    )
    guessed = transients_of(skeleton, layers)
    assert guessed == estimated(skeleton.config, 4)
    for size in SIZES:
        assert guessed.size_bytes(*size) >= measured.size_bytes(*size)


def test_measuring_leaves_the_skeleton_as_it_was() -> None:
    skeleton = skeleton_of("mixtral", num_hidden_layers=10)
    layers = find_moe_layers(skeleton, torch.float32)
    transients_of(skeleton, layers)
    assert len(find_moe_layers(skeleton, torch.float32)) == 10
    shape = model_shape("m", skeleton, layers)
    assert shape.predictor_bytes == 10 * 8 * 32 * 4 * 2
    assert shape.transients == transients_of(skeleton, layers)
