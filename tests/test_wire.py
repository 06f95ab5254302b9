"""The frames between app and engine: they survive the trip, and nonsense is refused as such."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import wire
from runtime.core import (
    Accepted,
    Delta,
    EmulatedMachine,
    EngineStatus,
    Finished,
    GenerationStats,
    LoadProgress,
    LoadRequest,
    Message,
    TelemetrySnapshot,
)
from runtime.errors import ProtocolError
from tests.hosted_fake import snapshot

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
STATS = GenerationStats(True, "card", "hybrid", 3, 4, predictor_recall=0.5)
RECORDS = [
    LoadRequest("m", "hybrid", 0.5, 7, 1e9, EmulatedMachine(link_call_s=0.5)),
    LoadRequest(),
    LoadRequest("m", experts="int4"),
    EngineStatus("loading", None, "m", LoadProgress("x", 1, 2), "n", "s", 3, ("one", "two")),
    Message("user", "\ud800 lone surrogate, NUL \x00, \u202e"),
    STATS,
    snapshot("m", "hybrid"),
]
CHUNKS = [Accepted(3, 1), Delta("reasoning", "é\ud83d", (1, 2)), Finished("length", STATS)]


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=4), st.data())
def test_frames_survive_any_cutting(bodies: list[dict[str, object]], data: st.DataObject) -> None:
    frames = [{**body, "op": "x"} for body in bodies]
    stream = b"".join(wire.encode_frame(frame) for frame in frames)
    decoder, received, at = wire.FrameDecoder(), [], 0
    while at < len(stream):
        size = data.draw(st.integers(1, len(stream) - at))
        received += decoder.feed(stream[at : at + size])
        at += size
    assert received == frames


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_any_bytes_give_frames_or_a_protocol_error(pieces: list[bytes]) -> None:
    decoder = wire.FrameDecoder()
    try:
        for piece in pieces:
            for frame in decoder.feed(piece):
                assert isinstance(frame["op"], str)
    except ProtocolError:
        pass


@settings(deadline=None)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_body_gives_a_frame_or_a_protocol_error(body: bytes) -> None:
    decoder = wire.FrameDecoder()
    try:
        (frame,) = decoder.feed(struct.pack(">I", len(body)) + body)
    except ProtocolError:
        return
    assert frame == json.loads(body)


def test_a_frame_nested_beyond_reason_is_refused() -> None:
    body = b"[" * 100_000
    with pytest.raises(ProtocolError):
        list(wire.FrameDecoder().feed(struct.pack(">I", len(body)) + body))


def test_a_claimed_size_beyond_the_cap_is_refused_before_it_arrives() -> None:
    with pytest.raises(ProtocolError, match="claims"):
        list(wire.FrameDecoder().feed(struct.pack(">I", wire.MAX_FRAME_BYTES + 1)))


def test_a_frame_beyond_the_cap_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 100)
    with pytest.raises(ProtocolError, match="too large"):
        wire.encode_frame({"op": "x", "text": "a" * 200})


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_survive_the_trip(record: object) -> None:
    sent = json.loads(json.dumps(asdict(record)))  # type: ignore[call-overload]
    assert wire.record_from_json(type(record), sent) == record


@pytest.mark.parametrize("chunk", CHUNKS, ids=lambda chunk: type(chunk).__name__)
def test_chunks_survive_the_trip(chunk: Accepted | Delta | Finished) -> None:
    assert wire.chunk_from_json(json.loads(json.dumps(wire.chunk_to_json(chunk)))) == chunk


@settings(deadline=None)
@given(st.sampled_from(RECORDS), st.data())
def test_a_wrong_field_is_a_protocol_error_or_harmless(record: object, data: st.DataObject) -> None:
    sent = json.loads(json.dumps(asdict(record)))  # type: ignore[call-overload]
    name = data.draw(st.sampled_from(sorted(sent)))
    sent[name] = data.draw(JSON)
    try:
        rebuilt = wire.record_from_json(type(record), sent)
    except ProtocolError:
        return
    assert type(rebuilt) is type(record)


@pytest.mark.parametrize(
    "value",
    [
        {"role": "wizard", "content": ""},
        {"role": "user", "content": 3},
        {"role": "user"},
        ["user", "x"],
        None,
    ],
)
def test_what_is_not_a_message_is_refused(value: object) -> None:
    with pytest.raises(ProtocolError):
        wire.record_from_json(Message, value)


def test_unknown_fields_of_a_newer_version_are_ignored() -> None:
    value = {"role": "user", "content": "x", "mood": "fine"}
    assert wire.record_from_json(Message, value) == Message("user", "x")


def test_a_tuple_of_another_length_is_refused() -> None:
    sent = {**asdict(snapshot("m", "p")), "served": [1, 2]}
    with pytest.raises(ProtocolError, match="served"):
        wire.record_from_json(TelemetrySnapshot, sent)
