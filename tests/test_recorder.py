"""A recorder passes everything on, and what it keeps is what happened."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

from runtime.adapter import attach
from runtime.predictor import Predictor
from runtime.recorder import Recorder, computing_in_place
from runtime.trace import load_trace, save_trace
from tests.checkpoints import attach_plain_runner, load, logits
from tests.families import make_checkpoint
from tests.routing_streams import EXPERTS, LAYERS, TOP_K, embedding, stream, views


def test_a_trace_tells_what_was_routed_and_guessed(tmp_path: Path) -> None:
    recorder = Recorder(Predictor(views(), embedding(), torch.float32))
    plain = Predictor(views(), embedding(), torch.float32)
    tokens = list(islice(stream(1), 5))
    passes = [tokens[:3], tokens[3:4], tokens[4:5]]  # a prompt of three, then two steps
    wanted = []
    for part in passes:
        ids = torch.cat([token.ids for token in part])
        assert recorder.begin_pass(ids).read() == plain.begin_pass(ids).read()
        for layer in range(LAYERS):
            rows = [
                torch.cat([getattr(token, name)[layer] for token in part])
                for name in ("inputs", "chosen", "weights")
            ]
            guessed = plain.launch(layer, *rows).read()
            assert recorder.launch(layer, *rows).read() == guessed
            wanted.append((rows[1], guessed))
    trace = recorder.trace([EXPERTS] * LAYERS, "made up")
    assert (trace.top_k, trace.experts) == (TOP_K, (EXPERTS,) * LAYERS)
    assert [(one.tokens, one.span) for one in trace.passes] == [(3, 3), (1, 1), (1, 1)]
    steps = [step for one in trace.passes for step in one.layers]
    for step, (chosen, guessed) in zip(steps, wanted, strict=True):
        flat = chosen.flatten().tolist()
        assert step.demands == {e: flat.count(e) for e in sorted(set(flat))}
        assert list(step.demands) == sorted(step.demands)
        assert step.predictions == guessed
        assert (step.recency is None) == (len(chosen) == 1)
    recency = trace.passes[0].layers[0].recency
    assert recency is not None
    last = tokens[2].chosen[0][0].tolist()
    assert all(recency[expert] >= 1.0 for expert in last)
    path = tmp_path / "trace.jsonl.gz"
    save_trace(path, trace)
    again = load_trace(path)
    assert [one.layers[2].demands for one in again.passes] == [
        one.layers[2].demands for one in trace.passes
    ]


def test_a_pass_that_was_cut_short_is_left_out() -> None:
    recorder = Recorder(Predictor(views(), embedding(), torch.float32))
    whole, cut = islice(stream(1), 2)
    for token, layers in ((whole, LAYERS), (cut, 1), (whole, LAYERS)):
        recorder.begin_pass(token.ids)
        for layer in range(layers):
            recorder.launch(layer, token.inputs[layer], token.chosen[layer], token.weights[layer])
    assert len(recorder.trace([EXPERTS] * LAYERS, "made up").passes) == 2


def test_computing_in_place_gives_the_same_logits_and_shows_every_layer(tmp_path: Path) -> None:
    opened = load(make_checkpoint("qwen3_moe", tmp_path))
    attach_plain_runner(opened.layers, opened.store)
    wanted = logits(opened.model)
    shown: list[int] = []
    run = computing_in_place(
        opened.layers, opened.store, lambda layer, x, i, w: shown.append(layer)
    )
    attach(opened.layers, run)
    assert all(torch.equal(a, b) for a, b in zip(wanted, logits(opened.model), strict=True))
    assert shown == [0, 1, 0, 1]
    opened.store.close()
