"""Activation tracing against plain definitions, and against what its paper says of it."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from runtime.activation_tracing import DEPTH_WEIGHT, TRIFLE, Level, MoeInfinityTracer
from runtime.activation_tracing_collection import ActivationMatrix, Collection, Match
from runtime.activation_tracing_eviction import ActivationEviction
from runtime.core import ExpertId
from runtime.errors import ModelFilesError

ROWS, EXPERTS = 4, 5

Grid = list[list[int]]
SEEDS = range(12)


def drawn(draw: random.Random) -> Grid:
    """Token counts, with empty rows among them."""
    return [
        [draw.choice((0, 0, 1, 2, 6)) * (row != empty) for _ in range(EXPERTS)]
        for empty in [draw.randrange(2 * ROWS)]
        for row in range(ROWS)
    ]


def matrix_of(grid: Grid) -> ActivationMatrix:
    matrix = ActivationMatrix(ROWS, EXPERTS)
    for row, tokens in enumerate(grid):
        demands = {expert: count for expert, count in enumerate(tokens) if count}
        if demands:
            matrix.add(row, demands)
    return matrix


def naive_similarity(query: Grid, entry: Grid) -> float:
    """Cosine of the flattened, row-normalised matrices over the rows the query has."""
    left, right = [], []
    for ours, theirs in zip(query, entry, strict=True):
        if sum(ours):
            left += [count / sum(ours) for count in ours]
            right += [count / max(sum(theirs), 1) for count in theirs]
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(np.dot(left, right)) / lengths if lengths else 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_similarity_is_the_cosine_of_row_normalised_matrices(seed: int) -> None:
    draw = random.Random(seed)
    kept, query = [drawn(draw) for _ in range(6)], drawn(draw)
    collection = Collection(ROWS, EXPERTS, 10)
    for grid in kept:
        collection.add(matrix_of(grid))
    expected = [naive_similarity(query, grid) for grid in kept]
    assert collection.similarities(matrix_of(query)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_match_that_grows_is_always_that_of_the_whole(seed: int) -> None:
    draw = random.Random(seed)
    kept = [drawn(draw) for _ in range(4)]
    collection = Collection(ROWS, EXPERTS, 10)
    for grid in kept:
        collection.add(matrix_of(grid))
    match, so_far = Match(collection), [[0] * EXPERTS for _ in range(ROWS)]
    match.add(1, {0: 3})
    match.clear()
    for _ in range(20):
        row, expert = draw.randrange(ROWS), draw.randrange(EXPERTS)
        match.add(row, {expert: 2})
        so_far[row][expert] += 2
        expected = [naive_similarity(so_far, grid) for grid in kept]
        assert match.similarities() == pytest.approx(expected, abs=1e-5)
        best = match.best()
        assert best is not None
        assert best[1] == pytest.approx(max(expected), abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_a_full_collection_replaces_the_entry_most_like_the_new_one(
    seed: int, capacity: int
) -> None:
    draw = random.Random(seed)
    seen = [drawn(draw) for _ in range(12)]
    collection = Collection(ROWS, EXPERTS, capacity)
    kept: list[Grid] = []
    for grid in seen:
        index = collection.add(matrix_of(grid))
        if len(kept) < capacity:
            assert index == len(kept)
            kept.append(grid)
        else:
            similarities = [naive_similarity(grid, other) for other in kept]
            assert similarities[index] == pytest.approx(max(similarities), abs=1e-5)
            kept[index] = grid
        assert collection.entry(index) == pytest.approx(matrix_of(grid).ratios(), abs=1e-6)
    assert len(collection) == min(len(seen), capacity)


def test_a_rare_pattern_survives_a_thousand_common_ones() -> None:
    collection = Collection(1, 4, 2)
    rare = ActivationMatrix(1, 4)
    rare.add(0, {3: 10})
    collection.add(rare)
    for tokens in range(1000):
        common = ActivationMatrix(1, 4)
        common.add(0, {0: 5 + tokens % 3, 1: 2})
        collection.add(common)
    assert float(collection.similarities(rare).max()) == pytest.approx(1.0)


class Topics:
    """Requests about one of a number of topics, each with its own favourite experts per layer."""

    def __init__(self, topics: int, layers: int = 6, experts: int = 24, seed: int = 0) -> None:
        self.layers, self.experts = layers, experts
        self._draw = np.random.default_rng(seed)
        self._logits = 2.0 * self._draw.normal(size=(topics, layers, experts))

    def tokens(self, topic: int, count: int, top_k: int = 3) -> NDArray[np.int64]:
        """Return the experts of `count` tokens, [count, layers, top_k]."""
        noise = self._draw.gumbel(size=(count, self.layers, self.experts))
        return np.argsort(-(self._logits[topic] + noise), axis=-1)[:, :, :top_k]

    def request(self, topic: int, count: int = 40) -> ActivationMatrix:
        matrix = ActivationMatrix(self.layers, self.experts)
        for layer, chosen in enumerate(np.moveaxis(self.tokens(topic, count), 1, 0)):
            experts, tokens = np.unique(chosen, return_counts=True)
            matrix.add(layer, dict(zip(experts.tolist(), tokens.tolist(), strict=True)))
        return matrix

    def any_topic(self) -> int:
        """Some topics are asked about far more often than others."""
        return int(min(self._draw.geometric(0.08), len(self._logits)) - 1)


def coverage(topics: Topics, entries: int, pick: Callable[[], int]) -> float:
    """Mean similarity of fresh requests to their best match among `entries` earlier ones."""
    collection = Collection(topics.layers, topics.experts, entries)
    for _ in range(entries):
        collection.add(topics.request(pick()))
    return float(
        np.mean([collection.similarities(topics.request(pick())).max() for _ in range(60)])
    )


def test_coverage_saturates_by_about_120_entries() -> None:
    topics = Topics(40)
    few, paper, many = (coverage(topics, n, topics.any_topic) for n in (8, 120, 480))
    assert paper > few + 0.05
    assert many < paper + 0.015
    assert paper > 0.9


def test_coverage_does_not_saturate_where_every_request_is_its_own_topic() -> None:
    topics = Topics(700)
    fresh = iter(range(700))
    paper, many = (coverage(topics, n, lambda: next(fresh)) for n in (120, 440))
    assert many < 0.8, "no earlier request says what a new one will use"
    assert paper < 0.8


def play_request(
    tracer: MoeInfinityTracer, topics: Topics, topic: int, prompt: int = 16, decode: int = 12
) -> None:
    """Trace one request, prompt and decoding, without ending it."""
    tracer.begin_request()
    for tokens, is_prompt in ((prompt, True), *(((1, False),) * decode)):
        tracer.begin_pass(prompt=is_prompt)
        for layer, chosen in enumerate(np.moveaxis(topics.tokens(topic, tokens), 1, 0)):
            experts, counts = np.unique(chosen, return_counts=True)
            tracer.routed(layer, dict(zip(experts.tolist(), counts.tolist(), strict=True)))


@pytest.mark.parametrize("level", ["iteration", "request"])
def test_the_match_of_a_running_request_is_one_of_its_topic(level: Level) -> None:
    topics = Topics(8)
    tracer = MoeInfinityTracer(topics.layers, topics.experts, level=level)
    written = [topic for topic in range(8) for _ in range(3)]
    for topic in written:
        play_request(tracer, topics, topic)
        tracer.end_request()
    right = 0
    for topic in range(8):
        play_request(tracer, topics, topic, decode=3)
        best = tracer.matched()
        assert best is not None
        right += written[best[0]] == topic
    assert right >= 7, f"{right} of 8 by {level}"


def test_prediction_from_the_first_layers_beats_the_average_of_all_requests() -> None:
    topics = Topics(8)
    tracer = MoeInfinityTracer(topics.layers, topics.experts)
    average = np.zeros((topics.layers, topics.experts))
    for topic in range(32):
        play_request(tracer, topics, topic % 8)
        average += tracer.request.ratios()[topics.layers :]
        tracer.end_request()
    found = guessed = 0
    for topic in range(8):
        for token in topics.tokens(topic, 10):
            tracer.begin_pass(prompt=False)
            for layer in range(3):
                tracer.routed(layer, dict.fromkeys(token[layer].tolist(), 1))
            for layer in range(3, topics.layers):
                used = set(token[layer].tolist())
                found += len(used & set(np.argsort(-tracer.predicted()[layer])[:6].tolist()))
                guessed += len(used & set(np.argsort(-average[layer])[:6].tolist()))
    assert found > 1.3 * guessed, (found, guessed)


def two_layers() -> MoeInfinityTracer:
    """Two layers of three experts; one request is collected: mostly expert 0, then expert 2."""
    tracer = MoeInfinityTracer(2, 3, level="request")
    tracer.begin_request()
    tracer.begin_pass(prompt=True)
    tracer.routed(0, {1: 4})
    tracer.routed(1, {1: 4})
    for _ in range(4):
        tracer.begin_pass(prompt=False)
        tracer.routed(0, {0: 1})
        tracer.routed(1, {2: 1})
    tracer.begin_pass(prompt=False)
    tracer.routed(0, {1: 1})
    tracer.routed(1, {1: 1})
    tracer.end_request()
    return tracer


def test_iteration_is_reset_every_pass_and_the_request_adds_up_by_kind() -> None:
    for level in ("iteration", "request"):
        tracer = MoeInfinityTracer(2, 3, level=level)  # type: ignore[arg-type]
        tracer.begin_request()
        tracer.begin_pass(prompt=True)
        tracer.routed(0, {1: 4, 2: 1})
        tracer.begin_pass(prompt=False)
        tracer.routed(0, {0: 1})
        tracer.begin_pass(prompt=False)
        tracer.routed(0, {0: 1})
        tracer.routed(1, {2: 1})
        assert tracer.iteration.counts.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]]
        assert tracer.request.counts.tolist() == [[0, 4, 1], [0, 0, 0], [2, 0, 0], [0, 0, 1]]


def test_priority_is_ratio_times_proximity() -> None:
    tracer = two_layers()
    tracer.begin_pass(prompt=False)
    tracer.routed(0, {0: 1})
    ratios = [[0.8, 0.2, 0.0], [0.0, 0.2, 0.8]]
    assert tracer.predicted() == pytest.approx(np.array(ratios))
    assert tracer.priorities(0) == pytest.approx(np.array([[0, 0, 0], [0, 0.1, 0.4]]))
    before_all = [[0.4, 0.1, 0.0], [0.0, 0.0, 0.0]]
    assert tracer.priorities(-1) == pytest.approx(np.array(before_all))
    assert not tracer.priorities(1).any(), "no layer is left"
    expected = [(ExpertId(1, 2), pytest.approx(0.4)), (ExpertId(1, 1), pytest.approx(0.1))]
    assert tracer.ranked(0, 5) == expected
    assert tracer.ranked(0, 1) == expected[:1]


def test_a_prompt_is_predicted_from_prompts_and_reuse_from_decoding() -> None:
    tracer = two_layers()
    tracer.begin_pass(prompt=True)
    tracer.routed(0, {1: 3})
    assert tracer.predicted() == pytest.approx(np.array([[0, 1.0, 0], [0, 1.0, 0]]))
    own = np.array([[0, 1.0, 0], [0, 0, 0]])
    match = np.array([[0.8, 0.2, 0], [0, 0.2, 0.8]])
    depth = np.array([[1.0], [1.0 - DEPTH_WEIGHT / 2]])
    assert tracer.reuse() == pytest.approx(((own + match) / 2 + TRIFLE) * depth)


def test_without_a_collection_the_request_itself_is_the_guess() -> None:
    tracer = MoeInfinityTracer(2, 3)
    tracer.begin_pass(prompt=False)
    assert tracer.matched() is None
    assert not tracer.predicted().any()
    tracer.routed(0, {0: 1})
    tracer.begin_pass(prompt=False)
    assert tracer.predicted()[0].tolist() == [1.0, 0.0, 0.0]


def test_a_request_without_a_pass_is_not_collected() -> None:
    tracer = MoeInfinityTracer(2, 3)
    tracer.begin_request()
    tracer.end_request()
    assert len(tracer.collection) == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_eviction_takes_the_lowest_predicted_reuse(seed: int) -> None:
    draw = random.Random(seed)
    tracer = MoeInfinityTracer(2, EXPERTS)
    rule, residents = ActivationEviction(tracer), set[ExpertId]()
    tracer.begin_pass(prompt=False)
    for _ in range(300):
        action = draw.choice(("route", "route", "admit", "admit", "victim", "pass", "end"))
        layer, number, flag = draw.randrange(2), draw.randrange(EXPERTS), draw.random() < 0.5
        expert = ExpertId(layer, number)
        if action == "route":
            tracer.routed(layer, {number: 1, (number + 1) % EXPERTS: 1})
        elif action == "pass":
            tracer.begin_pass(prompt=flag)
        elif action == "end":
            tracer.end_request()
        elif action == "admit" and expert not in residents:
            rule.admitted(expert, 0.0, prefetched=flag)
            residents.add(expert)
        elif action == "victim":
            may_go = {e for e in residents if not flag or e.expert % 2}
            victim = rule.victim(may_go.__contains__, 0.0, layer)
            assert (victim is None) == (not may_go)
            if victim is not None:
                values = {e: rule.worth(e, 0.0, layer) for e in may_go}
                assert values[victim] == min(values.values())
                assert values[victim] == tracer.reuse()[victim]
                assert rule.victim(may_go.__contains__, 0.0, layer) == victim
                rule.removed(victim)
                residents.remove(victim)


def test_of_two_equal_experts_the_deeper_leaves() -> None:
    tracer = MoeInfinityTracer(4, 2)
    tracer.begin_pass(prompt=False)
    for layer in range(4):
        tracer.routed(layer, {0: 1, 1: 1})
    rule = ActivationEviction(tracer)
    for layer in (2, 3, 0):
        rule.admitted(ExpertId(layer, 0), 0.0, prefetched=False)
    assert rule.victim(lambda e: True, 0.0, 0) == ExpertId(3, 0)


def saved(path: Path) -> Collection:
    collection = Collection(ROWS, EXPERTS, 8)
    for seed in range(5):
        grid = np.random.default_rng(seed).integers(0, 5, (ROWS, EXPERTS)).tolist()
        collection.add(matrix_of(grid))
    collection.save(path)
    return collection


def test_a_collection_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "traces"
    collection = saved(path)
    again = Collection.load(path, ROWS, EXPERTS, 8)
    assert len(again) == 5
    for index in range(5):
        assert np.array_equal(again.entry(index), collection.entry(index))
    query = matrix_of([[1, 2, 0, 0, 3]] * ROWS)
    assert np.array_equal(again.similarities(query), collection.similarities(query))
    assert len(Collection.load(path, ROWS, EXPERTS, 3)) == 3
    assert list(tmp_path.iterdir()) == [path]


def rewritten(path: Path, ratios: NDArray[np.float32], **changes: object) -> None:
    """Write a file whose checksum is right, whatever else is wrong with it."""
    packed = zlib.compress(ratios.tobytes())
    header = {
        "format": 1,
        "shape": ratios.shape,
        "sha256": hashlib.sha256(packed).hexdigest(),
    }
    path.write_bytes(json.dumps({**header, **changes}).encode() + b"\n" + packed)


GOOD = np.full((2, ROWS, EXPERTS), 1 / EXPERTS, np.float32)


def test_what_the_damages_are_made_from_is_good(tmp_path: Path) -> None:
    rewritten(tmp_path / "traces", GOOD)
    assert len(Collection.load(tmp_path / "traces", ROWS, EXPERTS, 8)) == 2


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(b"not a collection"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.write_bytes(b"[1]\n"), "cannot be read"),
        (lambda path: path.write_bytes(b"{}\n"), "format"),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), "checksum"),
        (lambda path: rewritten(path, GOOD, format=99), "format is 99"),
        (lambda path: rewritten(path, GOOD, shape=[2, ROWS]), "matrices are"),
        (lambda path: rewritten(path, GOOD[:, :2].copy()), "matrices are"),
        (lambda path: rewritten(path, GOOD, shape=[1, ROWS, EXPERTS]), "bytes, not"),
        (lambda path: rewritten(path, GOOD, shape=[3, ROWS, EXPERTS]), "bytes, not"),
        (lambda path: rewritten(path, GOOD, shape=[-1, ROWS, EXPERTS]), "cannot be read"),
        (lambda path: rewritten(path, GOOD, shape=["2", ROWS, EXPERTS]), "cannot be read"),
        (lambda path: rewritten(path, GOOD, shape=[10**30, ROWS, EXPERTS]), "cannot be read"),
        (lambda path: rewritten(path, -GOOD), "not ratios"),
        (lambda path: rewritten(path, GOOD * 3), "not ratios"),
        (lambda path: rewritten(path, GOOD * np.float32("nan")), "not ratios"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    tmp_path: Path, damage: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "traces"
    saved(path)
    damage(path)
    with pytest.raises(ModelFilesError, match=reason) as caught:
        Collection.load(path, ROWS, EXPERTS, 8)
    assert str(path) in caught.value.message
    assert caught.value.next_step


def test_one_flipped_byte_never_gives_a_wrong_collection(tmp_path: Path) -> None:
    path = tmp_path / "traces"
    collection = saved(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            again = Collection.load(path, ROWS, EXPERTS, 8)
        except ModelFilesError:
            continue
        for index in range(len(collection)):
            assert np.array_equal(again.entry(index), collection.entry(index)), place
