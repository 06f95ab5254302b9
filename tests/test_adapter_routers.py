"""Router views are what the routers do, checked against the real modules of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from runtime.adapter import MoeLayer
from runtime.adapter_routers import survey_routers
from runtime.loader import LoadedModel
from runtime.predictor_reuse import RouterView, folded, folded_from_residual, unit_rms
from tests.checkpoints import attach_plain_runner, load, logits, write_checkpoint
from tests.families import FAMILIES, make_checkpoint, tiny

ROWS = 200
# Their small configurations choose experts within groups, which is not one score per expert.
IN_GROUPS = {"deepseek_v3", "glm4_moe"}
NORMS = ("post_attention_layernorm", "pre_ff_layernorm")
EXTRA = {"minimax_m2": "e_score_correction_bias"}


def loaded(name: str, folder: Path, dtype: str = "float32") -> LoadedModel:
    return load(make_checkpoint(name, folder, dtype))


def norm_of(model: Any, layer: MoeLayer) -> nn.Module:
    """The norm before the experts, found by its name in the decoder layer: the test may know."""
    name = layer.name
    while name:
        name = name.rpartition(".")[0]
        owner = model.get_submodule(name)
        for norm in NORMS:
            if hasattr(owner, norm):
                return getattr(owner, norm)  # type: ignore[no-any-return]
    raise AssertionError(f"{layer.name} has no norm called {NORMS}")


def ask_router(model: Any, layer: MoeLayer, x: torch.Tensor, family: str) -> torch.Tensor:
    """Return (rows, experts) with a one for each expert that the real router chooses."""
    assert layer.router is not None
    block = model.get_submodule(layer.name.rpartition(".")[0])
    rest = (getattr(block, EXTRA[family]),) if family in EXTRA else ()
    chosen = layer.router(x, *rest)[2]
    return torch.zeros(x.shape[0], layer.experts).scatter_(1, chosen, 1.0)


def chosen_by(view: RouterView, raw: torch.Tensor) -> torch.Tensor:
    bias = 0.0 if view.bias is None else view.bias
    picked = view.scored(raw + bias).topk(view.top_k).indices
    return torch.zeros(raw.shape[0], view.experts).scatter_(1, picked, 1.0)


@pytest.mark.families
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in IN_GROUPS])
def test_a_folded_router_chooses_what_norm_and_router_choose_on_the_residual(
    family: str, tmp_path: Path
) -> None:
    opened = loaded(family, tmp_path)
    model, layers = opened.model, opened.layers
    residual = torch.randn(ROWS, 32, generator=torch.Generator().manual_seed(5)) * 7
    with torch.no_grad():
        for layer in layers:  # gains that differ, so that folding has something to fold
            gain = norm_of(model, layer).weight  # type: ignore[union-attr]
            values = torch.rand(gain.shape, generator=torch.Generator().manual_seed(layer.index))
            gain.copy_(values + 0.2)  # type: ignore[operator, arg-type]
        views = survey_routers(model, layers).views
        assert all(view is not None for view in views)
        near, far = layers[0], layers[1]
        near_view, far_view = views[0], views[1]
        assert near_view is not None
        assert far_view is not None
        seen_near, seen_far = (norm_of(model, layer)(residual) for layer in (near, far))
        assert near.router is not None
        assert far.router is not None
        matrix = folded(near_view, far_view)
        reference = seen_far @ far_view.weight.T
        torch.testing.assert_close(seen_near @ matrix.T, reference, rtol=2e-4, atol=2e-4)
        wanted = ask_router(model, far, seen_far, family)
        assert (chosen_by(far_view, seen_near @ matrix.T) * wanted).sum() >= 0.998 * wanted.sum()
        from_residual = unit_rms(residual) @ folded_from_residual(near_view).T
        wanted = ask_router(model, near, seen_near, family)
        assert (chosen_by(near_view, from_residual) * wanted).sum() >= 0.998 * wanted.sum()
    opened.store.close()


@pytest.mark.parametrize("family", sorted(IN_GROUPS))
def test_a_router_that_chooses_in_groups_is_reported_and_not_guessed(
    family: str, tmp_path: Path
) -> None:
    opened = loaded(family, tmp_path)
    survey = survey_routers(opened.model, opened.layers)
    opened.store.close()
    assert survey.views == (None, None)
    assert all("one score each" in reason for reason in survey.reasons)


@pytest.mark.parametrize("family", sorted(IN_GROUPS))
def test_the_same_families_without_groups_have_a_view_with_their_correction(
    family: str, tmp_path: Path
) -> None:
    config = tiny(family, n_group=1, topk_group=1, num_key_value_heads=4)
    write_checkpoint(config, tmp_path)
    opened = load(tmp_path)
    survey = survey_routers(opened.model, opened.layers)
    opened.store.close()
    for layer, view in zip(opened.layers, survey.views, strict=True):
        assert view is not None
        assert view.scoring == "sigmoid"
        correction = layer.router.e_score_correction_bias  # type: ignore[union-attr]
        assert view.selection_bias is not None
        assert torch.equal(view.selection_bias, correction)  # type: ignore[arg-type]


def test_the_bias_inside_a_router_is_told_from_one_on_its_scores(tmp_path: Path) -> None:
    opened = loaded("gpt_oss", tmp_path)
    (view, _) = survey_routers(opened.model, opened.layers).views
    opened.store.close()
    assert view is not None
    assert (view.scoring, view.selection_bias) == ("logits", None)
    assert view.bias is not None
    assert torch.equal(view.bias, opened.layers[0].router.bias)  # type: ignore[union-attr, arg-type]


class _Centering(nn.Module):
    """A layer norm: it takes the mean away, which no gain can undo."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(x)
        return out


def test_another_kind_of_norm_means_no_view_and_says_so(tmp_path: Path) -> None:
    opened = loaded("qwen3_moe", tmp_path)
    opened.model.model.layers[1].post_attention_layernorm = _Centering(32)
    survey = survey_routers(opened.model, opened.layers)
    opened.store.close()
    assert survey.views[0] is not None
    assert survey.views[1] is None
    assert "norm" in survey.reasons[1]


@pytest.mark.parametrize("family", ["afmoe", "ernie4_5_moe"])
def test_routers_of_other_habits_are_understood_too(family: str, tmp_path: Path) -> None:
    """One wants its rows in a batch, the other keeps its correction as a matrix of one row."""
    write_checkpoint(
        tiny(family, **({"n_group": 1, "topk_group": 1} if family == "afmoe" else {})), tmp_path
    )
    opened = load(tmp_path)
    survey = survey_routers(opened.model, opened.layers)
    opened.store.close()
    assert survey.reasons == ("", "")
    assert all(view is not None and view.selection_bias is not None for view in survey.views)


def test_half_precision_does_not_hide_a_router(tmp_path: Path) -> None:
    opened = loaded("qwen3_moe", tmp_path, "bfloat16")
    survey = survey_routers(opened.model, opened.layers)
    opened.store.close()
    assert all(view is not None for view in survey.views)


def test_a_model_that_cannot_be_probed_has_no_views_and_still_runs(tmp_path: Path) -> None:
    opened = loaded("qwen3_moe", tmp_path)
    attach_plain_runner(opened.layers, opened.store)
    before = logits(opened.model)
    forward = type(opened.model).forward

    def fails(self: Any, *args: Any, **named: Any) -> Any:
        raise ValueError("not today")

    type(opened.model).forward = fails
    try:
        survey = survey_routers(opened.model, opened.layers)
    finally:
        type(opened.model).forward = forward
    assert survey.views == (None, None)
    assert all("not today" in reason for reason in survey.reasons)
    # Neither hooks nor the function that answers zeros stayed behind.
    assert all(torch.equal(a, b) for a, b in zip(before, logits(opened.model), strict=True))
    opened.store.close()


def test_a_survey_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    opened = loaded("mixtral", tmp_path)
    attach_plain_runner(opened.layers, opened.store)
    before = logits(opened.model)
    survey_routers(opened.model, opened.layers)
    assert all(torch.equal(a, b) for a, b in zip(before, logits(opened.model), strict=True))
    hooks = [m for m in opened.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks
    opened.store.close()


def test_dimensions_whose_gain_is_zero_are_left_out(tmp_path: Path) -> None:
    opened = loaded("qwen3_moe", tmp_path)
    with torch.no_grad():
        opened.model.model.layers[0].post_attention_layernorm.weight[3] = 0.0
    near, far = survey_routers(opened.model, opened.layers).views
    opened.store.close()
    assert near is not None
    assert far is not None
    matrix = folded(near, far)
    assert torch.isfinite(matrix).all()
    assert (matrix[:, 3] == 0).all()
    assert (matrix[:, 4] != 0).any()
