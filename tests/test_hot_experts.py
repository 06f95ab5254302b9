"""Who gets the first slots: counted, kept, and never a reason not to start."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from runtime.core import ExpertId
from runtime.hot_experts import SAVE_EVERY_USES, HotExperts

EXPERTS = (4, 6, 4)


def test_the_most_used_come_and_the_hottest_is_the_last_to_be_admitted() -> None:
    hot = HotExperts(EXPERTS, None)
    for times, expert in ((5, 3), (9, 1), (2, 0)):
        for _ in range(times):
            hot.use(1, [expert])
    assert hot.first(3) == [ExpertId(1, 0), ExpertId(1, 3), ExpertId(1, 1)]


def test_without_uses_every_layer_gets_its_share() -> None:
    chosen = HotExperts(EXPERTS, None).first(6)
    assert Counter(expert.layer for expert in chosen) == {0: 2, 1: 2, 2: 2}


def test_whole_layers_come_in_order_whatever_was_used() -> None:
    hot = HotExperts(EXPERTS, None)
    hot.use(2, [1])
    assert set(hot.first(5, by_layer=True)) == {*(ExpertId(0, e) for e in range(4)), ExpertId(1, 0)}


def test_no_expert_comes_twice_and_never_more_than_there_are() -> None:
    hot = HotExperts(EXPERTS, None)
    generator = np.random.default_rng(0)
    for _ in range(200):
        layer = int(generator.integers(3))
        hot.use(layer, sorted(set(generator.integers(0, EXPERTS[layer], 2).tolist())))
    everybody = hot.first(99)
    assert len(everybody) == len(set(everybody)) == sum(EXPERTS)
    for slots in range(sum(EXPERTS)):
        assert hot.first(slots) == everybody[len(everybody) - slots :]


def test_counts_are_kept_and_fade_with_every_start(tmp_path: Path) -> None:
    file = tmp_path / "below" / "hot.json"
    before = HotExperts(EXPERTS, file)
    for _ in range(8):
        before.use(0, [2])
    before.save()
    now = HotExperts(EXPERTS, file)
    for _ in range(5):
        now.use(0, [1])
    assert now.first(2) == [ExpertId(0, 2), ExpertId(0, 1)]
    assert not now.notices


def test_a_pause_writes_only_after_many_uses(tmp_path: Path) -> None:
    hot = HotExperts(EXPERTS, tmp_path / "hot.json")
    hot.use(0, [0])
    hot.save(at_once=False)
    assert not (tmp_path / "hot.json").exists()
    for _ in range(SAVE_EVERY_USES):
        hot.use(0, [0])
    hot.save(at_once=False)
    assert (tmp_path / "hot.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "null",
        '{"version": 2, "uses": []}',
        json.dumps({"version": 1, "uses": [[1] * 4, [1] * 6]}),
        json.dumps({"version": 1, "uses": [[1] * 4, [1] * 5, [1] * 4]}),
        json.dumps({"version": 1, "uses": [[1] * 4, [-1] * 6, [1] * 4]}),
        '{"version": 1, "uses": [[NaN,1,1,1],[1,1,1,1,1,1],[1,1,1,1]]}',
        json.dumps({"version": 1, "uses": [["a"] * 4, [1] * 6, [1] * 4]}),
        "\udcff",
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_ignored(tmp_path: Path, text: str) -> None:
    file = tmp_path / "hot.json"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    hot = HotExperts(EXPERTS, file)
    assert "hot.json" in hot.notices[0]
    assert hot.first(3) == HotExperts(EXPERTS, None).first(3)


def test_forgetting_reaches_the_disk(tmp_path: Path) -> None:
    hot = HotExperts(EXPERTS, tmp_path / "hot.json")
    hot.use(0, [3])
    hot.save()
    hot.reset()
    assert not (tmp_path / "hot.json").exists()
    assert hot.first(3) == HotExperts(EXPERTS, None).first(3)


def test_a_disk_that_refuses_costs_nothing_but_a_notice(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file, not a folder")
    hot = HotExperts(EXPERTS, tmp_path / "taken" / "hot.json")
    hot.use(0, [3])
    hot.save()
    assert "could not be kept" in hot.notices[0]
