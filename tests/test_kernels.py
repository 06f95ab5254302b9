"""One expert's arithmetic, compared bit for bit with the loop that transformers calls eager."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from runtime.adapter import expert_math, expert_shapes, is_experts
from runtime.formats import lay_out
from runtime.kernels import add_in_order, combine, views
from tests.checkpoints import rows_of
from tests.families import FAMILIES, MORE_FAMILIES, tiny

# Every way of computing an expert that any family has.
KINDS: dict[str, Any] = {
    name: (FAMILIES | MORE_FAMILIES)[name]
    for name in ("qwen3_moe", "gpt_oss", "aria_text", "deepseek_v4", "nemotron_h", "inkling2_text")
} | {
    "muse_spark_text": lambda: tiny("muse_spark_text", moe_hidden_size=32),
    "openai_privacy_filter": lambda: tiny("openai_privacy_filter"),
}


def experts_module(kind: str, dtype: torch.dtype) -> Any:
    model = AutoModel.from_config(KINDS[kind](), dtype=dtype, experts_implementation="eager")
    module = next(module for module in model.modules() if is_experts(module))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module.eval()


def slots_of(module: Any, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """Copy each expert into bytes of its own, as a slot would hold it."""
    shapes = expert_shapes(module)
    name = str(dtype).removeprefix("torch.")
    layout = lay_out([(part, shape[1:], name) for part, shape in shapes.items()])
    experts = next(iter(shapes.values()))[0]
    slots = [
        views(torch.zeros(layout.size_bytes, dtype=torch.uint8), layout) for _ in range(experts)
    ]
    for expert, parts in enumerate(slots):
        for part, view in parts.items():
            view.copy_(getattr(module, part)[expert])
    return slots


def routed(tokens: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn((tokens, width), generator=generator).to(dtype)
    index = torch.rand((tokens, 8), generator=generator).argsort(dim=1)[:, :4]
    return hidden, index, torch.rand((tokens, 4), generator=generator)


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_and_combine_equal_eager(kind: str, dtype: torch.dtype, tokens: int) -> None:
    module = experts_module(kind, dtype)
    math, slots = expert_math(module), slots_of(module, dtype)
    width = expert_shapes(module)["down_proj"][2 if module.is_transposed else 1]
    for weights_dtype in {dtype, torch.float32}:
        hidden, index, weights = routed(tokens, width, dtype)
        weights = weights.to(weights_dtype)
        expected = inspect.unwrap(type(module).forward)(module, hidden, index, weights)
        rows = torch.full(
            (index.numel(), width), torch.nan, dtype=math.row_dtype(dtype, weights_dtype)
        )
        for expert in reversed(index.unique().tolist()):  # The order must not matter.
            token, position = rows_of(index, expert)
            rows[token * 4 + position] = math.rows(
                slots[expert], hidden[token], weights[token, position, None]
            )
        actual = combine(rows, index, dtype)
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def test_rows_are_added_in_ascending_expert_order_and_no_other() -> None:
    rows = torch.tensor([[1e8], [1.0], [-1e8]])
    assert combine(rows, torch.tensor([[0, 1, 2]]), torch.float32).item() == 0.0
    assert combine(rows, torch.tensor([[0, 2, 1]]), torch.float32).item() == 1.0
    assert combine(rows, torch.tensor([[2, 1, 0]]), torch.float32).item() == 0.0


def test_a_sum_starts_from_positive_zero_as_eager_does() -> None:
    total = add_in_order(torch.tensor([[[-0.0], [-0.0]]]), torch.float32)
    assert torch.signbit(total).item() is False


def test_views_share_memory_with_the_slot_and_do_not_overlap() -> None:
    layout = lay_out([("up", (3, 5), "bfloat16"), ("bias", (3,), "float32")])
    flat = torch.zeros(layout.size_bytes, dtype=torch.uint8)
    parts = views(flat, layout)
    parts["up"].fill_(1.0)
    parts["bias"].fill_(2.0)
    assert parts["up"].float().unique().tolist() == [1.0]
    assert parts["up"].shape == (3, 5)
    assert parts["bias"].tolist() == [2.0, 2.0, 2.0]
    assert all(part.data_ptr() % 4 == 0 for part in parts.values())
    flat.zero_()
    assert parts["up"].float().sum() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_rows_run_on_a_card(kind: str) -> None:
    module = experts_module(kind, torch.bfloat16).cuda()
    math = expert_math(module)
    slots = [{k: v.cuda() for k, v in slot.items()} for slot in slots_of(module, torch.bfloat16)]
    width = expert_shapes(module)["down_proj"][2 if module.is_transposed else 1]
    hidden, index, weights = (tensor.cuda() for tensor in routed(1, width, torch.bfloat16))
    expected = inspect.unwrap(type(module).forward)(module, hidden, index, weights)
    rows = torch.cat(
        [math.rows(slots[e], hidden, weights[:, j, None]) for j, e in enumerate(index[0].tolist())]
    )
    assert torch.equal(combine(rows, index, torch.bfloat16), expected)
