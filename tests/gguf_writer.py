"""Writes GGUF files for tests: any metadata, any tensor type, whole or damaged on request."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# name: number, numbers per block, bytes per block, byte offsets of its float16 scales.
TYPES: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "F32": (0, 1, 4, ()),
    "F16": (1, 1, 2, ()),
    "Q4_0": (2, 32, 18, (0,)),
    "Q4_1": (3, 32, 20, (0, 2)),
    "Q5_0": (6, 32, 22, (0,)),
    "Q5_1": (7, 32, 24, (0, 2)),
    "Q8_0": (8, 32, 34, (0,)),
    "IQ4_NL": (20, 32, 18, (0,)),
    "IQ4_XS": (23, 256, 136, (0,)),
    "Q2_K": (10, 256, 84, (80, 82)),
    "Q4_K": (12, 256, 144, (0, 2)),
    "Q5_K": (13, 256, 176, (0, 2)),
    "Q6_K": (14, 256, 210, (208,)),
    "BF16": (30, 1, 2, ()),
    "MXFP4": (39, 32, 17, ()),
}
QUANTISED = ("Q4_0", "Q4_1", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0", "MXFP4") + (
    "IQ4_NL",
    "IQ4_XS",
)
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Raw:
    """A metadata value that is written as it is, type number and all."""

    content: bytes


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file; `shape` is (..., outputs, inputs)."""

    type: str
    shape: tuple[int, ...]
    content: bytes


def stored(tensor: Tensor, kind: str = "F32") -> Stored:
    """Return a plain tensor's bytes."""
    raw = tensor.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy().tobytes()
    return Stored(kind, tuple(tensor.shape), raw)


def random_blocks(
    kind: str, shape: Sequence[int], generator: torch.Generator, size: float = 0.05
) -> Stored:
    """Return random blocks of a type, whose numbers are about `size` large."""
    if kind in PLAIN:
        return stored(torch.randn(tuple(shape), generator=generator) * size, kind)
    _, numbers, block_bytes, scales = TYPES[kind]
    blocks = shape.numel() if isinstance(shape, torch.Size) else torch.Size(shape).numel()
    raw = torch.randint(0, 256, (blocks // numbers, block_bytes), generator=generator)
    raw = raw.to(torch.uint8)
    steps = {"Q4_0": 8, "Q4_1": 8, "Q8_0": 128, "Q4_K": 480, "Q5_K": 960, "Q6_K": 2048}
    steps |= {"Q5_0": 16, "Q5_1": 16, "IQ4_NL": 128, "IQ4_XS": 2048}
    for number, offset in enumerate(scales):
        # The second scale is that of the minimum, which is to lie about half a range below zero.
        scale = size / steps[kind] * (0.5 + torch.rand(len(raw), generator=generator))
        if number:
            scale *= {"Q4_1": -8, "Q5_1": -16}.get(kind, 15)
        raw[:, offset : offset + 2] = scale.to(torch.float16)[:, None].view(torch.uint8)
    if kind == "MXFP4":
        raw[:, 0] = torch.randint(119, 122, (len(raw),), generator=generator).to(torch.uint8)
    return Stored(kind, tuple(shape), raw.numpy().tobytes())


def gguf_bytes(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    *,
    version: int = 3,
    alignment: int = 32,
    counts: tuple[int, int] | None = None,
    records: bytes | None = None,
) -> bytes:
    """Return a file; `counts` and `records` replace what would be right."""
    told = counts or (len(tensors), len(metadata))
    header = b"GGUF" + struct.pack("<IQQ", version, *told)
    for key, value in metadata.items():
        header += text(key) + _value(value)
    data = b""
    lines = b""
    for name, tensor in tensors.items():
        data += bytes(-len(data) % alignment)
        lines += record(name, tensor.shape, TYPES[tensor.type][0], len(data))
        data += tensor.content
    header += lines if records is None else records
    return header + bytes(-len(header) % alignment) + data + bytes(-len(data) % alignment)


def record(name: str, shape: Sequence[int], kind: int, offset: int) -> bytes:
    """Return a tensor record."""
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def write_split(folder: Path, stem: str, metadata: dict[str, Any], parts: Sequence[Any]) -> None:
    """Write `parts`, each a mapping of tensors, as the files of one model."""
    total = sum(len(tensors) for tensors in parts)
    for number, tensors in enumerate(parts):
        own = {"split.no": number, "split.count": len(parts), "split.tensors.count": total}
        content = gguf_bytes((metadata if number == 0 else {}) | own, tensors)
        (folder / f"{stem}-{number + 1:05d}-of-{len(parts):05d}.gguf").write_bytes(content)


def _value(value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.content
    if isinstance(value, list):
        items = b"".join(_value(item)[4:] for item in value)
        kind = _value(value[0])[:4] if value else struct.pack("<I", 8)
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(value)) + items
    if isinstance(value, bool):
        return struct.pack("<IB", 7, value)
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value) if value < 0 else struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + text(value)
