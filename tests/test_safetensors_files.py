"""Files from strangers: read exactly when they are whole, refused by name when they are not."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from runtime import safetensors_files
from runtime.errors import ModelFilesError
from runtime.safetensors_files import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    MAX_TENSORS,
    SINGLE_NAME,
    SafetensorsFiles,
    read_json,
)

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]}


def file_of(header: Any, data: bytes = bytes(24), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write(folder: Path, content: bytes) -> Path:
    (folder / SINGLE_NAME).write_bytes(content)
    return folder


WHOLE = file_of({"a": A, "b": B})
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "7 bytes": (WHOLE[:7], "7 bytes"),
    "only a length": (WHOLE[:8], "claims"),
    "half a header": (WHOLE[:40], "claims"),
    "cut by one byte": (WHOLE[:-1], "header describes"),
    "one byte too many": (WHOLE + b"x", "header describes"),
    "length 2^63": (file_of({"a": A}, length=2**63), str(2**63)),
    "length past the end": (file_of({"a": A}, length=10**6), "1000000"),
    "no JSON": (file_of(b"{]"), "JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "JSON"),
    "a list": (file_of([A]), "object"),
    "nested 50000 deep": (file_of(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "JSON"),
    "a name twice": (
        file_of(b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2), bytes(16)),
        "'a' is there twice",
    ),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [6]}}), "'a'"),
    "an extra key": (file_of({"a": {**A, "x": 1}}, bytes(16)), "'a'"),
    "a record that is none": (file_of({"a": [1, 2]}), "'a'"),
    "unknown dtype": (file_of({"a": {**A, "dtype": "F3"}}, bytes(16)), "'F3'"),
    "dtype of another type": (file_of({"a": {**A, "dtype": {}}}, bytes(16)), "dtype"),
    "negative shape": (file_of({"a": {**A, "shape": [-2, -2]}}, bytes(16)), "shape"),
    "shape overflow": (file_of({"a": {**A, "shape": [2**61, 2**61]}}, bytes(16)), "needs"),
    "shape of texts": (file_of({"a": {**A, "shape": ["2", 2]}}, bytes(16)), "shape"),
    "shape of booleans": (file_of({"a": {**A, "shape": [True, 4]}}, bytes(16)), "shape"),
    "rank 9": (file_of({"a": {**A, "shape": [1] * 8 + [4]}}, bytes(16)), "shape"),
    "wrong size": (file_of({"a": {**A, "shape": [3, 2]}}, bytes(16)), "needs 24 bytes"),
    "negative offsets": (file_of({"a": {**A, "data_offsets": [-16, 0]}}, bytes(16)), "offsets"),
    "three offsets": (file_of({"a": {**A, "data_offsets": [0, 16, 16]}}, bytes(16)), "offsets"),
    "offsets backwards": (file_of({"a": {**A, "data_offsets": [16, 0]}}, bytes(16)), "offsets"),
    "overlap": (file_of({"a": A, "b": {**B, "data_offsets": [8, 16]}}, bytes(16)), "'b'"),
    "a hole": (file_of({"a": A, "b": {**B, "data_offsets": [24, 32]}}, bytes(32)), "'b'"),
    "more tensors than any": (
        file_of(b"{" + b",".join(b'"%x":{}' % i for i in range(MAX_TENSORS + 2)) + b"}"),
        "more than 131072",
    ),
    "a list without end": (file_of(b'{"a":[' + b"[]," * 2**21 + b"[]]}"), "more than 131072"),
    "brackets alone": (file_of(b'{"a":' + b"[" * 2**21 + b"}"), "values"),
    "spaces": (file_of(b'{"a":' + b" " * 2**24 + b"1}"), "'a'"),
    "a number without end": (file_of(b'{"a":' + b"1" * 2**24 + b"}"), "JSON"),
    "metadata of another type": (file_of({"__metadata__": 1, "a": A}, bytes(16)), "metadata"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    content, expected = HOSTILE[case]
    with pytest.raises(ModelFilesError) as refused:
        SafetensorsFiles(write(tmp_path, content))
    assert SINGLE_NAME in refused.value.message
    assert expected in refused.value.message
    assert refused.value.next_step


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(WHOLE) - 25), st.binary(min_size=1, max_size=6))
def test_any_change_of_a_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, patch: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp()
    write(folder, WHOLE[:at] + patch + WHOLE[at + len(patch) :])
    with contextlib.suppress(ModelFilesError):
        SafetensorsFiles(folder).close()


@pytest.mark.parametrize("positioned", [True, False])
def test_bytes_arrive_as_another_library_wrote_them(
    positioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not positioned:
        monkeypatch.setattr(safetensors_files, "_PREADV", None)  # As on Windows.
    tensors = {"x": torch.randn(5, 7), "y": torch.arange(9, dtype=torch.int64)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    files = SafetensorsFiles(tmp_path)
    for name, tensor in tensors.items():
        entry = files.tensors[name]
        assert (entry.shape, entry.dtype) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        raw = bytearray(entry.size_bytes)
        files.read([(name, 0, memoryview(raw))])
        assert raw == tensor.numpy().tobytes()
        part = bytearray(8)
        files.read([(name, 16, memoryview(part))])
        assert part == raw[16:24]
    files.close()
    files.close()


def shards(folder: Path, weight_map: Any) -> Path:
    save_file({"a": torch.zeros(4)}, folder / "model-1.safetensors")
    save_file({"b": torch.ones(4)}, folder / "model-2.safetensors")
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (folder / INDEX_NAME).write_text(text, encoding="utf-8")
    return folder


def test_shards_are_one_table(tmp_path: Path) -> None:
    folder = shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    files = SafetensorsFiles(folder)
    assert files.tensors.keys() == {"a", "b"}
    raw = bytearray(16)
    files.read([("b", 0, memoryview(raw))])
    assert raw == torch.ones(4).numpy().tobytes()
    files.close()


NAMES = [
    "../model-1.safetensors",
    "/etc/passwd",
    "/etc/passwd.safetensors",
    "sub/model-1.safetensors",
    "sub\\model-1.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "\\\\server\\share\\model.safetensors",
    "model-1.safetensors/../../x.safetensors",
    "..",
    ".",
    "",
    ".safetensors",
    "-rf.safetensors",
    "model-1.bin",
    "model-1.safetensors\n",
    "model-1.safetensors\x00.txt",
    "model\u202e.safetensors",
    "~/model.safetensors",
    "$HOME.safetensors",
    "http://example.com/model.safetensors",
    "x" * 300 + ".safetensors",
    "CON.safetensors",
    "nul.safetensors",
    "Com7.model.safetensors",
    "LPT1.safetensors",
    "conout$.safetensors",
    "\\\\.\\PhysicalDrive0.safetensors",
    "//server/share/model.safetensors",
    "model-1.safetensors:stream",
    "model-1.safetensors ",
    " model-1.safetensors",
    "model-1.safetensors.",
    "%2e%2e%2fmodel.safetensors",
    "file:///etc/passwd.safetensors",
    "missing.safetensors",
    None,
    1,
    ["model-1.safetensors"],
    {"name": "model-1.safetensors"},
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
def test_an_index_may_only_name_shards_in_its_folder(
    name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shards(tmp_path, {"a": name, "b": "model-2.safetensors"})
    opened: list[Path] = []
    really = safetensors_files.open_regular

    def watch(path: Path) -> Any:
        opened.append(path)
        return really(path)

    monkeypatch.setattr(safetensors_files, "open_regular", watch)
    with pytest.raises(ModelFilesError):
        SafetensorsFiles(folder)
    assert all(path.parent == folder for path in opened)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 10_000, '{"a":1,"a":2}'],
)
def test_a_damaged_index_is_refused(index: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="index.json"):
        SafetensorsFiles(shards(tmp_path, index))


@pytest.mark.parametrize(
    ("weight_map", "named"),
    [
        ({"a": "model-2.safetensors", "b": "model-2.safetensors"}, "'a'"),
        ({"a": "model-1.safetensors", "c": "model-2.safetensors"}, "'c'"),
    ],
)
def test_a_tensor_missing_from_its_shard_is_named(
    weight_map: dict[str, str], named: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelFilesError, match=f"lacks tensor {named}"):
        SafetensorsFiles(shards(tmp_path, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, folder / "model-2.safetensors")
    with pytest.raises(ModelFilesError, match="'a' is also in model-1.safetensors"):
        SafetensorsFiles(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")
def test_links_out_of_the_folder_and_pipes_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shards(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    (folder / "model-2.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model-2.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(ModelFilesError, match="leads out"):
        SafetensorsFiles(folder)
    (folder / "model-2.safetensors").unlink()
    os.mkfifo(folder / "model-2.safetensors")
    with pytest.raises(ModelFilesError, match="not a regular file"):
        SafetensorsFiles(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="devices of POSIX")
@pytest.mark.parametrize("device", ["/dev/zero", "/dev/stdin", "/proc/self/mem"])
def test_a_shard_that_is_a_device_is_refused_at_once(device: str, tmp_path: Path) -> None:
    folder = shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    (folder / "model-2.safetensors").unlink()
    (folder / "model-2.safetensors").symlink_to(device)
    with pytest.raises(ModelFilesError, match=r"model-2\.safetensors"):
        SafetensorsFiles(folder)


def test_an_index_of_a_gigabyte_is_refused_by_its_size(tmp_path: Path) -> None:
    folder = shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    os.truncate(folder / INDEX_NAME, 2**30)  # a hole: nothing is written
    with pytest.raises(ModelFilesError, match=str(MAX_INDEX_BYTES)):
        SafetensorsFiles(folder)


def test_what_an_index_says_of_the_total_is_not_trusted_and_does_no_harm(tmp_path: Path) -> None:
    """Honest files are often wrong here, and nothing depends on it."""
    folder = shards(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    record = json.loads((folder / INDEX_NAME).read_text())
    for size in (-1, 2**70, "many", None):
        (folder / INDEX_NAME).write_text(json.dumps(record | {"metadata": {"total_size": size}}))
        SafetensorsFiles(folder).close()


_WATCH = """
import sys, time
from pathlib import Path
from runtime.errors import ModelFilesError
from runtime.safetensors_files import SafetensorsFiles
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before, began = peak(), time.process_time()
try:
    SafetensorsFiles(Path(sys.argv[1]))
except ModelFilesError:
    print(peak() - before, time.process_time() - began)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("case", ["a list without end", "brackets alone", "spaces", "length 2^63"])
def test_hostile_headers_cost_little_time_and_memory(case: str, tmp_path: Path) -> None:
    write(tmp_path, HOSTILE[case][0])
    out = subprocess.run(
        [sys.executable, "-c", _WATCH, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[1],
    ).stdout
    memory_bytes, cpu_s = map(float, out.split())
    assert memory_bytes < 200 * 2**20
    assert cpu_s < 1


def test_a_folder_with_other_formats_only_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch flag'\ntR.")
    with pytest.raises(ModelFilesError, match="pytorch_model.bin") as refused:
        SafetensorsFiles(tmp_path)
    assert "safetensors" in refused.value.next_step
    with pytest.raises(ModelFilesError, match="not a folder"):
        SafetensorsFiles(tmp_path / "nowhere")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 8)


@pytest.mark.parametrize("fault", [cut, lambda path: os.truncate(path, 0)])
def test_a_file_that_shrinks_while_open_is_an_error_not_a_crash(
    fault: Callable[[Path], None], tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / SINGLE_NAME)
    files = SafetensorsFiles(tmp_path)
    fault(tmp_path / SINGLE_NAME)
    with pytest.raises(ModelFilesError, match=r"ends at byte \d+, inside tensor 'a'"):
        files.read([("a", 0, memoryview(bytearray(4000)))])
    files.close()
    with pytest.raises(ModelFilesError, match="failed"):
        files.read([("a", 0, memoryview(bytearray(4000)))])


def overwritten(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-8] + bytes(8))
    os.utime(path, ns=(1, 1))  # whatever the clock's ticks


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed there")
@pytest.mark.parametrize("past_cache", [False, True])
@pytest.mark.parametrize("fault", [overwritten, touched])
def test_a_file_that_changes_while_open_is_not_read_on(
    fault: Callable[[Path], None], past_cache: bool, tmp_path: Path
) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE_NAME)
    files = SafetensorsFiles(tmp_path)
    files.read_past_cache(past_cache)
    files.read([("a", 0, memoryview(bytearray(4000)))])
    fault(tmp_path / SINGLE_NAME)
    with pytest.raises(ModelFilesError, match="changed while the model is loaded"):
        files.read([("a", 0, memoryview(bytearray(4000)))])
    files.close()


@pytest.mark.skipif(sys.platform != "linux", reason="it counts what /proc lists")
def test_asking_twice_for_reads_past_the_cache_leaves_nothing_open(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1000)}, tmp_path / SINGLE_NAME)

    def still_open() -> int:
        links = [os.readlink(f"/proc/self/fd/{one}") for one in file_numbers()]
        return links.count(str((tmp_path / SINGLE_NAME).resolve()))

    def file_numbers() -> list[str]:
        return [
            one for one in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{one}")
        ]

    files = SafetensorsFiles(tmp_path)
    files.read_past_cache(True)
    first = still_open()
    for on in (True, False, True, True):
        files.read_past_cache(on)
    files.read([("a", 0, memoryview(bytearray(4000)))])
    assert still_open() == first
    files.close()
    assert still_open() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
def test_a_file_that_is_deleted_or_replaced_while_open_is_read_as_it_was(tmp_path: Path) -> None:
    for way in ("deleted", "replaced"):
        save_file({"a": torch.ones(1000)}, tmp_path / SINGLE_NAME)
        files = SafetensorsFiles(tmp_path)
        if way == "deleted":
            (tmp_path / SINGLE_NAME).unlink()
        else:
            save_file({"a": torch.zeros(1000)}, tmp_path / "other.safetensors")
            (tmp_path / "other.safetensors").replace(tmp_path / SINGLE_NAME)
        raw = bytearray(4000)
        files.read([("a", 0, memoryview(raw))])
        assert raw == torch.ones(1000).numpy().tobytes()
        files.close()


def test_json_is_capped_by_size_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"a": [[[1]]]}), encoding="utf-8")
    assert read_json(path, 100) == {"a": [[[1]]]}
    with pytest.raises(ModelFilesError, match="deeper than 3"):
        read_json(path, 100, max_depth=3)
    with pytest.raises(ModelFilesError, match="at most 5"):
        read_json(path, 5)
