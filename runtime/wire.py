"""How the app and the engine process talk: length-prefixed JSON frames over two pipes.

A frame is a four-byte big-endian length and that many bytes of UTF-8 JSON, always an object with a
string `op`. The first frame of the engine is `hello` with the protocol version. Every malformed
byte, type or value is a `ProtocolError`, never another exception.
"""

from __future__ import annotations

import json
import os
import struct
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.core import Accepted, Delta, Finished, GenerationChunk
from runtime.errors import ProtocolError

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 2**20
READ_BYTES = 64 * 1024

Frame = dict[str, Any]
Record = TypeVar("Record")

_LENGTH = struct.Struct(">I")
_CHUNKS: dict[str, type[GenerationChunk]] = {
    "accepted": Accepted,
    "delta": Delta,
    "finished": Finished,
}


def encode_frame(frame: Mapping[str, Any]) -> bytes:
    """Return the bytes of one frame.

    Raises:
        ProtocolError: the frame is larger than the other side would accept.
    """
    body = json.dumps(frame, separators=(",", ":")).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise ProtocolError(
            f"A message of {len(body):,} bytes is too large; at most {MAX_FRAME_BYTES:,} fit.",
            "Shorten the conversation.",
        )
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts a stream of bytes, fed in any pieces, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that are complete after `data`.

        Raises:
            ProtocolError: the bytes are not frames; nothing after them can be trusted.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_FRAME_BYTES:
                raise ProtocolError(f"A frame claims {size:,} bytes; that is not our protocol.")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield _parse(body)


def read_frames(descriptor: int) -> Iterator[Frame]:
    """Yield frames from a pipe until its end; blocks while there is nothing.

    Raises:
        ProtocolError: the bytes are not frames.
        OSError: the pipe cannot be read.
    """
    decoder = FrameDecoder()
    while data := os.read(descriptor, READ_BYTES):
        yield from decoder.feed(data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte to a pipe.

    Raises:
        OSError: the other side is gone.
    """
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _parse(body: bytes) -> Frame:
    try:
        frame = json.loads(body)
    except (ValueError, RecursionError) as failure:
        raise ProtocolError("A frame does not hold JSON.") from failure
    if not isinstance(frame, dict) or not isinstance(frame.get("op"), str):
        raise ProtocolError("A frame is not an object with an 'op'.")
    return frame


def chunk_to_json(chunk: GenerationChunk) -> Frame:
    """Describe a chunk; `chunk_from_json` rebuilds it."""
    kind = next(name for name, record in _CHUNKS.items() if isinstance(chunk, record))
    return {"kind": kind, "value": asdict(chunk)}


def chunk_from_json(value: object) -> GenerationChunk:
    """Rebuild a chunk.

    Raises:
        ProtocolError: `value` does not describe one.
    """
    if not isinstance(value, dict) or value.get("kind") not in _CHUNKS:
        raise ProtocolError("A chunk is neither accepted, delta nor finished.")
    return record_from_json(_CHUNKS[value["kind"]], value.get("value"))


def record_from_json(record: type[Record], value: object) -> Record:
    """Rebuild a frozen record from what `dataclasses.asdict` made of it.

    Unknown fields are ignored and missing ones take their defaults, so that versions may differ.

    Raises:
        ProtocolError: a field has the wrong type, or a required one is missing.
    """
    if not isinstance(value, dict):
        raise ProtocolError(f"{record.__name__} must be an object.")
    described: Any = record
    hints = _hints(described)
    given = {name: _convert(hints[name], value[name], name) for name in hints if name in value}
    try:
        return record(**given)
    except TypeError as failure:
        raise ProtocolError(f"{record.__name__} lacks a field: {failure}") from failure


@cache
def _hints(record: Any) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def _convert(hint: Any, value: object, name: str) -> Any:
    """Return `value` as the type `hint`, or raise ProtocolError."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(get_args(hint), value, name)
    if origin is Literal:
        if value in get_args(hint) and isinstance(value, str):
            return value
    elif origin is tuple:
        if isinstance(value, (list, tuple)):
            return _convert_tuple(get_args(hint), value, name)
    elif is_dataclass(hint):
        return record_from_json(hint, value) if isinstance(hint, type) else value
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return _as_float(value, name)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ProtocolError(f"The field {name!r} has the wrong type.")


def _convert_union(choices: tuple[Any, ...], value: object, name: str) -> Any:
    if value is None and type(None) in choices:
        return None
    (wanted,) = (choice for choice in choices if choice is not type(None))
    return _convert(wanted, value, name)


def _convert_tuple(items: tuple[Any, ...], value: list[Any] | tuple[Any, ...], name: str) -> Any:
    if len(items) == 2 and items[1] is Ellipsis:
        return tuple(_convert(items[0], item, name) for item in value)
    if len(items) != len(value):
        raise ProtocolError(f"The field {name!r} must have {len(items)} values.")
    return tuple(_convert(hint, item, name) for hint, item in zip(items, value, strict=True))


def _as_float(value: int | float, name: str) -> float:
    try:
        return float(value)
    except OverflowError as failure:
        raise ProtocolError(f"The field {name!r} is too large.") from failure
