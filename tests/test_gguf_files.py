"""GGUF files from strangers: read exactly when they are whole, refused by name when not."""

from __future__ import annotations

import contextlib
import struct
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import gguf_header
from runtime.errors import ModelFilesError, UnsupportedModelError
from runtime.gguf_files import GgufFiles, gguf_paths, is_gguf, logical_shape
from tests.gguf_writer import (
    TYPES,
    Raw,
    Stored,
    gguf_bytes,
    random_blocks,
    record,
    stored,
    text,
    write_split,
)

A = stored(torch.arange(6.0).view(2, 3))
B = random_blocks("Q8_0", (2, 64), torch.Generator().manual_seed(0))
META: dict[str, Any] = {
    "general.architecture": "qwen3moe",
    "general.alignment": 32,
    "a.flag": True,
    "a.number": -7,
    "a.float": 0.5,
    "a.texts": ["one", "", "zw\N{LATIN SMALL LETTER O WITH DIAERESIS}lf"],
    "a.numbers": [1, 2, 3],
    "a.none": [],
}
WHOLE = gguf_bytes(META, {"a": A, "b": B})
LONG = struct.pack("<Q", 2**62)


def with_records(*records: bytes, data: int = 192, **options: Any) -> bytes:
    """A file of 24 bytes of `a` and 136 of `b`, described by other records."""
    tensors = {"x": Stored("F32", (data // 4,), bytes(data))}
    count = (len(records), len(META))
    return gguf_bytes(META, tensors, counts=count, records=b"".join(records), **options)


def with_value(value: bytes) -> bytes:
    return gguf_bytes({**META, "x": Raw(value)}, {"a": A})


ARRAY = struct.pack("<I", 9)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0"),
    "3 bytes": (WHOLE[:3], "has 3"),
    "another magic": (b"GGML" + WHOLE[4:], "GGUF"),
    "only magic": (WHOLE[:4], "has 4"),
    "half the counts": (WHOLE[:12], "has 12"),
    "half the metadata": (WHOLE[:100], "has 100"),
    "cut in the records": (WHOLE[: len(WHOLE) - 260], "header asks"),
    "cut in the data": (WHOLE[:-30], "ends at byte"),
    "a block too many": (WHOLE + bytes(32), "header describes"),
    "one byte too many": (WHOLE + b"x", "header describes"),
    "version 1": (gguf_bytes(META, {}, version=1), "version 1"),
    "version 4": (gguf_bytes(META, {}, version=4), "version 4"),
    "big-endian": (gguf_bytes(META, {}, version=3 << 24), "big-endian"),
    "2^62 tensors": (gguf_bytes(META, {"a": A}, counts=(2**62, 8)), str(2**62)),
    "2^62 keys": (gguf_bytes(META, {"a": A}, counts=(1, 2**62)), str(2**62)),
    "more keys than there are": (gguf_bytes(META, {"a": A}, counts=(1, 9000)), "a.gguf"),
    "a tensor more than there is": (gguf_bytes(META, {"a": A}, counts=(2, 8)), "dimensions|byte"),
    "a key of 2^62 bytes": (
        gguf_bytes({}, {}, counts=(0, 1), records=LONG + bytes(64)),
        "a key claims",
    ),
    "a key that is not UTF-8": (
        gguf_bytes({}, {}, counts=(0, 1), records=text(b"\xff\xfe") + bytes(8)),
        "UTF-8",
    ),
    "a key twice": (
        gguf_bytes({}, {}, counts=(0, 2), records=(text("k") + struct.pack("<IB", 0, 1)) * 2),
        "'k' is there twice",
    ),
    "a text of 2^62 bytes": (with_value(struct.pack("<I", 8) + LONG), "claims"),
    "a text that is not UTF-8": (with_value(struct.pack("<I", 8) + text(b"\xc3")), "UTF-8"),
    "value type 13": (with_value(struct.pack("<I", 13) + bytes(8)), "type 13"),
    "value type 2^32-1": (with_value(b"\xff" * 4), "type 4294967295"),
    "a flag of 2": (with_value(struct.pack("<IB", 7, 2)), "neither true nor false"),
    "a list of 2^62 texts": (with_value(ARRAY + struct.pack("<I", 8) + LONG), "texts"),
    "a list of 2^62 numbers": (with_value(ARRAY + struct.pack("<I", 10) + LONG), "claims"),
    "a list of lists": (with_value(ARRAY * 2 + LONG), "lists of lists"),
    "a list of type 77": (with_value(ARRAY + struct.pack("<IQ", 77, 1)), "type 77"),
    "a list of 3 texts that ends": (
        with_value(ARRAY + struct.pack("<IQ", 8, 3) + text("x") + LONG),
        "byte",
    ),
    "alignment 0": (gguf_bytes({"general.alignment": 0}, {"a": A}), "alignment is 0"),
    "alignment 24": (gguf_bytes({"general.alignment": 24}, {"a": A}), "no power of two"),
    "alignment 2^31": (gguf_bytes({"general.alignment": 2**31}, {"a": A}), str(2**31)),
    "alignment in words": (gguf_bytes({"general.alignment": "32"}, {"a": A}), "'?32'?"),
    "a name of 2^62 bytes": (with_records(LONG), "claims"),
    "a name of 300 bytes": (with_records(record("n" * 300, (6,), 0, 0)), "300 bytes"),
    "a name that is not UTF-8": (with_records(text(b"\xff") + bytes(40)), "UTF-8"),
    "no dimensions": (with_records(record("a", (), 0, 0)), "0 dimensions"),
    "5 dimensions": (with_records(record("a", (1,) * 5, 0, 0)), "5 dimensions"),
    "a dimension of 0": (with_records(record("a", (0, 3), 0, 0)), "the shape"),
    "a dimension of 2^63": (with_records(record("a", (2**63,), 0, 0)), str(2**63)),
    "a shape that overflows": (with_records(record("a", (2**32,) * 3, 0, 0)), "the shape"),
    "unknown tensor type": (with_records(record("a", (6,), 4, 0)), "unknown type 4"),
    "half a block": (with_records(record("a", (2, 48), 8, 0)), "fill no blocks"),
    "an offset of 2^64-1": (with_records(record("a", (6,), 0, 2**64 - 1)), "instead of"),
    "an offset between alignments": (with_records(record("a", (6,), 0, 8)), "instead of"),
    "an offset that leaves a hole": (with_records(record("a", (6,), 0, 64)), "instead of"),
    "tensors that overlap": (
        with_records(record("a", (32,), 0, 0), record("b", (32,), 0, 64)),
        "'b' begins",
    ),
    "a tensor in the place of another": (
        with_records(record("a", (6,), 0, 0), record("b", (6,), 0, 0)),
        "begins",
    ),
    "a tensor past the end": (with_records(record("a", (2**40,), 0, 0)), "ends at byte"),
    "a tensor twice": (
        with_records(record("a", (32,), 0, 0), record("a", (16,), 0, 128)),
        "'a' is there twice",
    ),
}


def opened(folder: Path, content: bytes) -> GgufFiles:
    path = folder / "a.gguf"
    path.write_bytes(content)
    return GgufFiles(path)


def test_a_whole_file_is_read_exactly(tmp_path: Path) -> None:
    files = opened(tmp_path, WHOLE)
    told = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in files.metadata.items()}
    assert told == META
    assert [logical_shape(entry) for entry in files.tensors.values()] == [(2, 3), (2, 64)]
    assert {name: (e.stored, e.dtype, e.shape) for name, e in files.tensors.items()} == {
        "a": ("F32", "float32", (2, 3)),
        "b": ("Q8_0", "uint8", (2, 68)),
    }
    for name, tensor in (("a", A), ("b", B)):
        buffer = bytearray(len(tensor.content) - 5)
        files.read([(name, 5, memoryview(buffer))])
        assert bytes(buffer) == tensor.content[5:]
    files.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_soon_and_in_little_memory(
    name: str, tmp_path: Path
) -> None:
    content, words = HOSTILE[name]
    (tmp_path / "a.gguf").write_bytes(content)
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises((ModelFilesError, UnsupportedModelError), match=words) as caught:
        GgufFiles(tmp_path / "a.gguf")
    assert time.perf_counter() - begin < 1
    assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    tracemalloc.stop()
    assert "a.gguf" in caught.value.message
    assert caught.value.next_step


def test_a_header_full_of_texts_costs_little_and_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = 32
    count = gguf_header.MAX_STRINGS // share
    values = ARRAY + struct.pack("<IQ", 8, count) + text("ab") * count
    content = gguf_bytes({"x": Raw(values)}, {})
    tracemalloc.start()
    files = opened(tmp_path, content)
    assert files.metadata["x"] == ["ab"] * count
    assert tracemalloc.get_traced_memory()[1] * share < 300 * 2**20
    tracemalloc.stop()
    files.close()
    monkeypatch.setattr(gguf_header, "MAX_STRINGS", 2 * count - 1)
    with pytest.raises(ModelFilesError, match="'y' brings the texts"):
        opened(tmp_path, gguf_bytes({"x": Raw(values), "y": Raw(values)}, {}))
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", len(content) // 2)
    with pytest.raises(ModelFilesError, match="longer than|claims"):
        opened(tmp_path, content)


@pytest.mark.parametrize("kind", ["Q2_K"])
def test_other_tensor_types_are_refused_by_their_name(kind: str, tmp_path: Path) -> None:
    _, numbers, block_bytes, _ = TYPES[kind]
    with pytest.raises(UnsupportedModelError, match=f"{kind} tensors cannot be read yet"):
        opened(tmp_path, gguf_bytes(META, {"a": Stored(kind, (1, numbers), bytes(block_bytes))}))


@settings(max_examples=250, deadline=1000)
@given(st.data())
def test_no_damage_escapes_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(("byte", "number", "cut", "copy")))
        if what == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "number":
            number = data.draw(st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
            content[at : at + 8] = struct.pack("<Q", number)
        elif what == "cut":
            del content[max(at, 1) :]
        else:
            content[at:at] = content[: data.draw(st.integers(1, 64))]
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    path.write_bytes(content)
    files = None
    with contextlib.suppress(ModelFilesError, UnsupportedModelError):
        files = GgufFiles(path)
    if files is not None:
        for name, entry in files.tensors.items():
            files.read([(name, 0, memoryview(bytearray(entry.size_bytes)))])
        files.close()


def test_a_split_model_is_found_from_any_part_or_its_folder(tmp_path: Path) -> None:
    write_split(tmp_path, "m", META, [{}, {"a": A}, {"b": B}])
    parts = sorted(tmp_path.iterdir())
    for path in (tmp_path, *parts):
        files = GgufFiles(path)
        assert files.paths == tuple(parts)
        assert {name: entry.file for name, entry in files.tensors.items()} == {"a": 1, "b": 2}
        assert files.metadata["general.architecture"] == "qwen3moe"
        buffer = bytearray(len(B.content))
        files.read([("b", 0, memoryview(buffer))])
        assert bytes(buffer) == B.content
        files.close()
    parts[1].unlink()
    with pytest.raises(ModelFilesError, match="m-00002-of-00003.gguf is missing"):
        GgufFiles(parts[0])


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_split(tmp_path, "m", META, [{"a": A}, {"a": A}])
    with pytest.raises(ModelFilesError, match="'a' is also in m-00001"):
        GgufFiles(tmp_path)
    write_split(tmp_path, "m", META, [{"a": A}, {"b": B}])
    first, second = sorted(tmp_path.iterdir())
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    with pytest.raises(ModelFilesError, match="part 1 of 2"):
        GgufFiles(tmp_path)
    own = {"split.no": 0, "split.count": 2, "split.tensors.count": 3}
    first.write_bytes(gguf_bytes(META | own, {"a": A}))
    with pytest.raises(ModelFilesError, match="tells of 3 tensors, but there are 2"):
        GgufFiles(tmp_path)
    own["split.count"] = 3
    first.write_bytes(gguf_bytes(META | own, {"a": A}))
    with pytest.raises(ModelFilesError, match="of 3"):
        GgufFiles(tmp_path)
    for name in ("m-00003-of-00002.gguf", "m-00000-of-00002.gguf", "m-00001-of-00000.gguf"):
        (tmp_path / name).write_bytes(contents[0])
        with pytest.raises(ModelFilesError, match="parts|part of"):
            GgufFiles(tmp_path / name)


def test_a_folder_has_to_hold_one_model(tmp_path: Path) -> None:
    assert not is_gguf(tmp_path)
    with pytest.raises(ModelFilesError, match="no GGUF model"):
        gguf_paths(tmp_path)
    (tmp_path / "mmproj-F16.gguf").write_bytes(WHOLE)
    assert not is_gguf(tmp_path)
    (tmp_path / "m-Q4_K_M.gguf").write_bytes(WHOLE)
    assert is_gguf(tmp_path)
    assert gguf_paths(tmp_path) == (tmp_path / "m-Q4_K_M.gguf",)
    (tmp_path / "m-Q8_0.gguf").write_bytes(WHOLE)
    with pytest.raises(ModelFilesError, match="2 GGUF models .m-Q4_K_M.gguf, m-Q8_0.gguf"):
        gguf_paths(tmp_path)
    assert gguf_paths(tmp_path / "m-Q8_0.gguf") == (tmp_path / "m-Q8_0.gguf",)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_gguf(tmp_path)
    assert is_gguf(tmp_path / "m-Q8_0.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_found_files_may_not_be_links_that_lead_elsewhere(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "m.gguf").write_bytes(WHOLE)
    (inside / "m.gguf").symlink_to(outside / "m.gguf")
    with pytest.raises(ModelFilesError, match="leads out"):
        GgufFiles(inside)
    GgufFiles(inside / "m.gguf").close()
    cache = tmp_path / "models--o--n"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "1").mkdir(parents=True)
    (cache / "blobs" / "ab").write_bytes(WHOLE)
    (cache / "snapshots" / "1" / "m.gguf").symlink_to(cache / "blobs" / "ab")
    GgufFiles(cache / "snapshots" / "1").close()


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(tmp_path: Path) -> None:
    files = opened(tmp_path, WHOLE)
    (tmp_path / "a.gguf").write_bytes(WHOLE[:-100])
    with pytest.raises(ModelFilesError, match="inside tensor 'b'"):
        files.read([("b", 0, memoryview(bytearray(len(B.content))))])
    files.close()
