"""For every family: a prompt in pieces, one after a cut and one at once give the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter_cache import KvCache
from tests.checkpoints import load_reference, write_checkpoint
from tests.families import FAMILIES, MORE_FAMILIES

TOKENS = 45
PIECES = ([20, 13, 11, 1], [30] + [1] * 15)


def family(name: str, folder: Path) -> Any:
    config = (FAMILIES | MORE_FAMILIES)[name]()
    write_checkpoint(config, folder)
    return load_reference(folder, config)


def logits(model: Any, ids: torch.Tensor, cache: KvCache) -> torch.Tensor:
    with torch.inference_mode():
        output = model(input_ids=ids, past_key_values=cache.past, use_cache=True)
    cache.past = output.past_key_values
    answer: torch.Tensor = output.logits[0]
    return answer


def check(name: str, folder: Path) -> None:
    model = family(name, folder)
    ids = torch.randint(3, 150, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[0]
    bound = 1e-3 * float(whole.std())
    for pieces in PIECES:
        cache = KvCache(model.config)
        if not cache.continues:
            pieces = [TOKENS - 15] + [1] * 15
        parts = [logits(model, piece, cache) for piece in ids.split(pieces, dim=1)]
        assert float((torch.cat(parts) - whole).abs().max()) < bound
    if cache.can_crop:
        cache.crop(17)
        after = logits(model, ids[:, 17:], cache)
        assert float((after - whole[17:]).abs().max()) < bound


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_and_cuts_change_nothing(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.families
@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_pieces_and_cuts_change_nothing_in_any_family(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


def test_a_family_on_the_list_still_needs_to_be_there(tmp_path: Path) -> None:
    """When transformers mends jamba, this fails and it can leave the list."""
    model = family("jamba", tmp_path)
    cache = KvCache(model.config)
    assert not cache.continues
    ids = torch.randint(3, 150, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    parts = [logits(model, piece, cache) for piece in ids.split([20, 25], dim=1)]
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits[0]
    assert float((torch.cat(parts) - whole).abs().max()) > 0.1 * float(whole.std())


def test_full_attention_can_be_cut_and_windows_cannot() -> None:
    assert KvCache(FAMILIES["qwen3_moe"]()).can_crop
    for name in ("gpt_oss", "qwen3_next", "jamba"):
        assert not KvCache(FAMILIES[name]()).can_crop
