"""The engine process by itself: what it says first, what it shrugs off, and when it goes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from runtime.core import LoadRequest, Message, SamplingParams
from runtime.inbox import Change, Inbox
from runtime.private_streams import EXIT_APP_GONE, EXIT_DEVICE_LOST, EXIT_PROTOCOL
from runtime.wire import PROTOCOL_VERSION, encode_frame, read_frames, write_all

ROOT = Path(__file__).resolve().parent.parent


class Host:
    def __init__(self, assembly: str = "tests.hosted_fake") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime.host", "--assembly", assembly],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.frames = read_frames(self.stdout.fileno())

    def send(self, frame: dict[str, Any]) -> None:
        write_all(self.stdin.fileno(), encode_frame(frame))

    def load(self, model: str, number: int = 1) -> None:
        request = asdict(LoadRequest(model))
        self.send({"op": "load", "number": number, "request": request})

    def generate(self, text: str, request_id: int = 1) -> None:
        self.send(
            {
                "op": "generate",
                "id": request_id,
                "conversation_id": f"c{request_id}",
                "messages": [asdict(Message("user", text))],
                "params": asdict(SamplingParams()),
            }
        )

    def until(self, op: str, **wanted: Any) -> dict[str, Any]:
        for frame in self.frames:
            value = frame.get("value", {})
            if frame["op"] == op and all(value.get(k) == v for k, v in wanted.items()):
                return frame
        raise AssertionError(f"it ended before {op}")


@pytest.fixture
def host() -> Iterator[Host]:
    one = Host()
    yield one
    one.process.kill()
    one.process.wait()
    one.stdin.close()
    one.stdout.close()


def test_it_greets_first_and_before_torch(host: Host) -> None:
    assert next(host.frames) == {"op": "hello", "protocol": PROTOCOL_VERSION}
    maps = Path(f"/proc/{host.process.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text()


def test_it_volunteers_for_the_oom_killer(host: Host) -> None:
    next(host.frames)
    score = Path(f"/proc/{host.process.pid}/oom_score_adj")
    if not score.exists():
        pytest.skip("only Linux has one")
    assert int(score.read_text()) > 0


@pytest.mark.parametrize("model", ["model", "slow"])
def test_the_end_of_the_pipe_ends_it_at_once(host: Host, model: str) -> None:
    host.load(model)
    host.until("status", state="loading")
    if model == "model":
        host.generate("forever")
        host.until("chunk")
    began = time.monotonic()
    host.stdin.close()
    assert host.process.wait(5) == EXIT_APP_GONE
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        encode_frame({"op": "sing"}),
        encode_frame({"op": "generate", "id": "x"}),
        encode_frame({"op": "load", "number": 1, "request": {"policy": "wish"}}),
        encode_frame({"op": "stop"}),
        encode_frame({"op": "prediction", "on": 1}),
    ],
)
def test_what_it_does_not_understand_ends_it(host: Host, data: bytes) -> None:
    next(host.frames)
    write_all(host.stdin.fileno(), data)
    assert host.process.wait(10) == EXIT_PROTOCOL


def test_ctrl_c_in_a_terminal_is_for_the_app(host: Host) -> None:
    next(host.frames)
    os.kill(host.process.pid, signal.SIGINT)
    host.load("model")
    host.until("status", state="ready")


def test_a_waiting_generation_can_be_stopped(host: Host) -> None:
    host.load("model")
    host.generate("forever", 1)
    host.until("chunk")
    host.generate("forever", 2)
    host.send({"op": "stop", "id": 2})
    host.send({"op": "stop", "id": 1})
    ended = []
    while len(ended) < 2:
        frame = host.until("chunk")
        if frame["chunk"]["kind"] == "finished":
            ended.append((frame["id"], frame["chunk"]["value"]["reason"]))
    assert ended == [(1, "cancelled"), (2, "cancelled")]


def test_loads_that_arrive_out_of_order_leave_the_newest(host: Host) -> None:
    host.load("newest", 2)
    host.load("late", 1)
    assert host.until("status", state="ready")["value"]["model"] == "newest"
    host.generate("x")
    host.until("front")
    host.send({"op": "cancel_load", "number": 3})
    assert host.until("status")["value"]["model"] == "newest"


@pytest.mark.parametrize("model", ["broken", "raising", "never fits", "slow"])
def test_a_failed_load_is_forgotten_before_the_previous_model_comes_back(
    host: Host, model: str
) -> None:
    host.load("card")  # on a card the old model leaves before the new one comes
    host.until("status", state="ready", model="card")
    host.load(model, 2)
    if model == "slow":
        host.until("status", loading=model)
        host.send({"op": "cancel_load", "number": 3})
    while (value := host.until("status")["value"])["state"] == "loading":
        pass
    assert (value["state"], value["model"]) == ("ready", "card"), value["notice"]
    assert bool(value["notice"]) == (model != "slow")


def test_transfers_that_stopped_for_good_end_it_after_a_word(host: Host) -> None:
    host.load("model")
    host.generate("stall")
    assert "No expert arrived" in host.until("failed")["error"]["message"]
    assert host.process.wait(5) == EXIT_DEVICE_LOST


def test_memory_is_watched_while_nobody_asks_anything(host: Host) -> None:
    host.load("model")
    for _ in range(2):
        host.until("snapshot", model="model, watched")
    host.generate("x")  # it learns from that for a while, and goes on watching
    host.until("snapshot", model="model, rested 3")
    host.until("snapshot", model="model, watched")


def test_the_inbox_waits_as_long_as_it_was_told() -> None:
    inbox = Inbox()
    began = time.monotonic()
    assert inbox.take(wait=True, limit_s=0.05) is None
    assert time.monotonic() - began >= 0.04
    change = Change("policy", "hybrid")
    threading.Timer(0.05, inbox.change, [change]).start()
    assert inbox.take(wait=True, limit_s=60.0) == change
    threading.Timer(0.05, inbox.change, [change]).start()
    assert inbox.take(wait=True) == change


@pytest.mark.slow
def test_the_real_engine_answers_through_the_pipe() -> None:
    host = Host("runtime.assembly")
    try:
        host.load("default")
        host.generate("Hello")
        frame = host.until("chunk")
        while frame["chunk"]["kind"] != "finished":
            frame = host.until("chunk")
        assert frame["chunk"]["value"]["stats"]["new_tokens"] > 0
    finally:
        host.process.kill()
        host.process.wait()
        host.stdin.close()
        host.stdout.close()


@pytest.mark.slow
def test_the_real_engine_answers_two_at_once_and_each_as_if_alone() -> None:
    host = Host("runtime.assembly")

    def token_ids(wanted: int, ended: set[int]) -> dict[int, list[int]]:
        """Read until so many requests have ended; the ids of each, in `order` as they came."""
        ids: dict[int, list[int]] = {}
        while len(ended) < wanted:
            frame = host.until("chunk")
            chunk = frame["chunk"]
            order.append(frame["id"])
            if chunk["kind"] == "finished":
                ended.add(frame["id"])
            elif chunk["kind"] == "delta":
                ids.setdefault(frame["id"], []).extend(chunk["value"]["token_ids"])
                if frame["id"] == 3 and len(ids[3]) == 5:
                    host.send({"op": "stop", "id": 3})
        return ids

    order: list[int] = []
    try:
        host.load("default")
        host.generate("Tell me about the sea.", 1)
        alone = token_ids(1, set())[1]
        host.generate("Tell me about the sea.", 2)
        host.generate("What is 17 + 5?", 3)
        order.clear()
        together = token_ids(2, set())
        assert together[2] == alone
        assert order.index(3) < len(order) - 1 - order[::-1].index(2)
        turns = sum(left != right for left, right in zip(order, order[1:], strict=False))
        assert turns > 4, "one was answered after the other"
    finally:
        host.process.kill()
        host.process.wait()
        host.stdin.close()
        host.stdout.close()
