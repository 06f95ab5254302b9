"""For every family: a prompt in pieces, one after a cut and one at once give the same logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from runtime.adapter_cache import GrowingLayer, KvCache
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


def stock_logits(model: Any, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the model computes with the cache that transformers gives it."""
    past, found = None, []
    for piece in pieces:
        with torch.inference_mode():
            output = model(input_ids=piece, past_key_values=past, use_cache=True)
        past = output.past_key_values
        found.append(output.logits[0])
    return found


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
        assert all(map(torch.equal, parts, stock_logits(model, ids.split(pieces, dim=1))))
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


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 2, tokens, 4, generator=torch.Generator().manual_seed(seed))


def held_bytes(layer: GrowingLayer) -> int:
    return layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()


def test_tokens_are_appended_in_place_and_move_only_when_the_room_is_used_up() -> None:
    layer, all_keys, moves = GrowingLayer(), states(0), 0
    place = None
    for number, tokens in enumerate([50] + [1] * 96):
        if number % 32 == 1:
            layer.expected_tokens = all_keys.shape[-2] + 32
        keys, values = states(tokens, number), states(tokens, 1000 + number)
        all_keys = torch.cat([all_keys, keys], dim=-2)
        got, got_values = layer.update(keys, values)
        assert torch.equal(got, all_keys)
        assert torch.equal(got_values[..., -tokens:, :], values)
        assert layer.get_seq_length() == all_keys.shape[-2]
        moves += got.data_ptr() != place
        place = got.data_ptr()
        assert held_bytes(layer) == 2 * max(layer.expected_tokens, 50) * 2 * 4 * 4
    assert moves == 4


def test_what_is_cut_gives_its_memory_back_and_what_follows_overwrites_nothing() -> None:
    layer = GrowingLayer()
    whole, _ = layer.update(states(40), states(40))
    seen = whole.clone()
    layer.cut(10)
    assert held_bytes(layer) == 2 * 10 * 2 * 4 * 4
    after, _ = layer.update(states(5, 7), states(5, 7))
    assert torch.equal(after, torch.cat([seen[..., :10, :], states(5, 7)], dim=-2))
    assert torch.equal(whole, seen), "who still looks at the old states sees what they were"
    # transformers' own cut leaves a view: what follows goes on in its place.
    layer.crop(-3)
    again, _ = layer.update(states(2, 8), states(2, 8))
    assert torch.equal(
        again, torch.cat([seen[..., :10, :], states(5, 7)[..., :2, :], states(2, 8)], -2)
    )


def test_states_of_others_are_taken_over_and_not_written_into() -> None:
    layer = GrowingLayer()
    layer.update(states(4), states(4))
    theirs = states(9, 5)
    layer.keys = layer.values = theirs
    got, _ = layer.update(states(1, 6), states(1, 6))
    assert torch.equal(got, torch.cat([theirs, states(1, 6)], dim=-2))
    layer.reset()
    assert layer.get_seq_length() == 0
    got, _ = layer.update(states(3), states(3))
    assert torch.equal(got, states(3))


def test_a_settled_cache_holds_its_tokens_and_no_room() -> None:
    cache = KvCache(FAMILIES["qwen3_moe"]())
    layer = cache.past.layers[0]
    cache.expect(16)
    layer.update(states(6), states(6))
    assert held_bytes(layer) == 2 * 16 * 2 * 4 * 4
    cache.settle()
    assert held_bytes(layer) == 2 * 6 * 2 * 4 * 4
    assert torch.equal(layer.keys, states(6))


def test_without_memory_to_move_to_a_conversation_stays_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = KvCache(FAMILIES["qwen3_moe"]())
    layers = cache.past.layers
    for layer in layers:
        layer.update(states(6), states(6, 1))
    clone, left = torch.Tensor.clone, [3]

    def full(tensor: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory, planted")
        return clone(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "clone", full)
        cache.settle()
    assert left[0] < 0
    for layer in layers:
        assert torch.equal(layer.keys, states(6))
        assert torch.equal(layer.values, states(6, 1))
        got, _ = layer.update(states(2, 5), states(2, 5))
        assert torch.equal(got, torch.cat([states(6), states(2, 5)], dim=-2))


def test_a_layer_that_never_got_its_values_can_be_cut() -> None:
    """Memory ran out between its keys and its values."""
    layer = GrowingLayer()
    layer.lazy_initialization(states(1), states(1))
    layer.cut(0)
    layer.lazy_initialization(states(1), states(1))
    layer.keys = states(4)
    layer.cut(2)
    got, _ = layer.update(states(3), states(3))
    assert torch.equal(got, states(3))


def test_states_of_another_type_get_a_place_of_their_own() -> None:
    layer = GrowingLayer()
    layer.update(states(4), states(4))
    got, _ = layer.update(states(1).double(), states(1).double())
    assert got.dtype == torch.float64
