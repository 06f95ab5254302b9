"""Kept experts: nothing tears them while they are written, and no damage is ever believed."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime import expert_file_blocks
from runtime.core import ExpertId
from runtime.errors import BusyError, DiskError, ModelFilesError
from runtime.expert_file import ExpertFile, ExpertFileWriter, open_expert_file
from runtime.expert_file_blocks import places
from runtime.expert_file_header import (
    BLOCK_BYTES,
    PREAMBLE,
    ExpertFileHeader,
    LayerExperts,
    SourceFile,
    delete,
    describe_source,
    file_path,
    kept_files,
    partial_path,
)
from runtime.formats import Form, Matrix, lay_out

ROOT = Path(__file__).resolve().parent.parent
EXPERTS = (5, 3, 4)


def make_header(**changes: Any) -> ExpertFileHeader:
    layers = []
    for number, count in enumerate(EXPERTS):
        matrix = Matrix("up", (6 + number, 700), Form("int8", columns=350))
        layout = lay_out(
            [("up", (6 + number, 700), "int8"), ("up.scales", (6 + number, 2), "float32")], [matrix]
        )
        layers.append(LayerExperts(count, layout))
    header = ExpertFileHeader(
        "Tiny é", "int8", "test 1", "0" * 64, (SourceFile("a.safetensors", 9, 8),), tuple(layers)
    )
    return replace(header, **changes)


def all_experts(header: ExpertFileHeader) -> list[ExpertId]:
    return [
        ExpertId(layer, expert)
        for layer, experts in enumerate(header.layers)
        for expert in range(experts.experts)
    ]


def content(header: ExpertFileHeader, expert: ExpertId) -> bytes:
    size = header.layers[expert.layer].format.size_bytes
    return random.Random(f"{expert.layer}/{expert.expert}").randbytes(size)


def write(path: Path, header: ExpertFileHeader, most: int = 10**9) -> int:
    """Write or resume a file; return how many experts had to be written."""
    writer = ExpertFileWriter(path, header)
    written = 0
    for expert in all_experts(header):
        into = bytearray(header.layers[expert.layer].format.size_bytes)
        if writer.read(expert, memoryview(into)):
            assert bytes(into) == content(header, expert)
            continue
        if written == most:
            writer.close()
            return written
        writer.write(expert, memoryview(content(header, expert)))
        written += 1
    writer.finish().close()
    return written


def read_all(file: ExpertFile) -> None:
    for expert in all_experts(file.header):
        into = bytearray(file.header.layers[expert.layer].format.size_bytes)
        file.read(expert, memoryview(into))
        assert bytes(into) == content(file.header, expert), expert


def opened(path: Path, header: ExpertFileHeader) -> ExpertFile:
    file, why = open_expert_file(path, header)
    assert file is not None, why
    return file


def check_whole(path: Path, header: ExpertFileHeader) -> None:
    file = opened(path, header)
    try:
        read_all(file)
    finally:
        file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return file_path(tmp_path / "experts", tmp_path, "int8")


def test_what_is_written_is_read_back(path: Path) -> None:
    header = make_header()
    assert write(path, header) == len(all_experts(header))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    file = opened(path, header)
    read_all(file)
    read_all(file)
    file.close()


def test_every_expert_begins_at_a_whole_block_and_the_last_block_is_whole(path: Path) -> None:
    header = make_header()
    place = places(header)
    write(path, header)
    raw = path.read_bytes()
    assert len(raw) == place.size_bytes
    assert len(raw) % BLOCK_BYTES == 0
    ends = 0
    for expert in all_experts(header):
        at = place.offset(expert)
        assert at % BLOCK_BYTES == 0
        assert at >= ends
        ends = at + header.layers[expert.layer].format.size_bytes
        assert raw[at:ends] == content(header, expert)


def test_there_is_no_reason_where_there_is_no_file(path: Path) -> None:
    assert open_expert_file(path, make_header()) == (None, "")


@pytest.mark.parametrize("after", [0, 1, 4, 5, 9, 11])
def test_a_broken_off_file_is_taken_up_where_it_ended(path: Path, after: int) -> None:
    header = make_header()
    assert write(path, header, after) == after
    assert open_expert_file(path, header) == (None, "")
    assert write(path, header) == len(all_experts(header)) - after
    check_whole(path, header)


def test_a_file_does_not_depend_on_how_often_it_was_taken_up(path: Path, tmp_path: Path) -> None:
    header = make_header()
    for _ in range(20):
        write(path, header, 1)
    straight = tmp_path / "straight.int8.experts"
    write(straight, header)
    assert path.read_bytes() == straight.read_bytes()


def test_a_damaged_expert_of_a_broken_off_file_is_written_again(path: Path) -> None:
    header = make_header()
    write(path, header, 7)
    partial = partial_path(path)
    flip(partial, places(header).offset(ExpertId(0, 3)) + 100)
    writer = ExpertFileWriter(path, header)
    into = memoryview(bytearray(header.layers[0].format.size_bytes))
    assert writer.read(ExpertId(0, 2), into)
    assert not writer.read(ExpertId(0, 3), into)
    writer.close()
    assert write(path, header) == len(all_experts(header)) - 6
    check_whole(path, header)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"quantiser": "test 2"}, "another version"),
    ({"config_sha256": "1" * 64}, "have changed"),
    ({"sources": (SourceFile("a.safetensors", 9, 7),)}, "have changed"),
    ({"sources": ()}, "have changed"),
    ({"kind": "int4"}, "another way"),
    ({"layers": make_header().layers[:2]}, "another way"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_a_file_of_something_else_is_ignored_and_replaced(
    path: Path, change: dict[str, Any], why: str
) -> None:
    write(path, make_header(**change))
    wanted = make_header()
    file, said = open_expert_file(path, wanted)
    assert file is None
    assert why in said
    assert path.name in said
    write(path, wanted)
    check_whole(path, wanted)


@pytest.mark.parametrize(("change", "why"), CHANGES)
def test_the_beginnings_of_something_else_are_begun_again(
    path: Path, change: dict[str, Any], why: str
) -> None:
    other, wanted = make_header(**change), make_header()
    write(path, other, 5)
    assert write(path, wanted) == len(all_experts(wanted))
    check_whole(path, wanted)


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x10
    path.write_bytes(raw)


def test_no_flipped_bit_and_no_cut_is_believed(path: Path) -> None:
    header = make_header()
    write(path, header)
    raw = path.read_bytes()
    place = places(header)
    used = [*range(PREAMBLE.size + len(header.encoded()))]
    used += range(place.table_at, place.table_at + 8 * header.expert_count)
    for expert in all_experts(header):
        begin = place.offset(expert)
        used += range(begin, begin + header.layers[expert.layer].format.size_bytes)
    chance = random.Random(5)
    for _ in range(150):
        path.write_bytes(raw)
        flip(path, chance.choice(used))
        assert not sound(path, header)
    for cut in [0, 1, 7, PREAMBLE.size, 5000, len(raw) - BLOCK_BYTES, len(raw) - 1]:
        path.write_bytes(raw[:cut])
        assert not sound(path, header)
    path.write_bytes(raw + b"\0")
    assert not sound(path, header)
    path.write_bytes(raw)
    assert sound(path, header)


def sound(path: Path, header: ExpertFileHeader) -> bool:
    file, why = open_expert_file(path, header)
    if file is None:
        assert path.name in why
        return False
    try:
        read_all(file)
    except ModelFilesError:
        return False
    finally:
        file.close()
    return True


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"PSEXPERT",
        b"PK" * 4000,
        PREAMBLE.pack(b"PSEXPERT", 2, 10, 0, 0) + b"x" * 100,
        PREAMBLE.pack(b"PSEXPERT", 1, 2**32 - 1, 0, 0),
        PREAMBLE.pack(b"PSEXPERT", 1, 4, 0x414FA339, 1) + b"null",
    ],
    ids=["empty", "magic", "other", "newer", "huge", "null"],
)
def test_a_foreign_file_is_ignored_by_name(path: Path, raw: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(raw)
    partial_path(path).write_bytes(raw)
    file, why = open_expert_file(path, make_header())
    assert file is None
    assert path.name in why
    assert [kept.model for kept in kept_files(path.parent)] == ["", ""]
    write(path, make_header())
    check_whole(path, make_header())


def test_a_damaged_expert_can_be_healed_but_only_with_itself(path: Path) -> None:
    header = make_header()
    write(path, header)
    at = ExpertId(1, 2)
    flip(path, places(header).offset(at))
    file = opened(path, header)
    into = memoryview(bytearray(header.layers[1].format.size_bytes))
    with pytest.raises(ModelFilesError, match="expert 2 of MoE layer 1"):
        file.read(at, into)
    assert not file.heal(at, memoryview(content(header, ExpertId(1, 1))))
    assert file.heal(at, memoryview(content(header, at)))
    read_all(file)
    file.close()


def refusal(path: Path, header: ExpertFileHeader) -> DiskError | None:
    try:
        write(path, header)
    except DiskError as error:
        return error
    return None


class FullDisk:
    """Lets so many writes and syncs through and then has no room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        self.left = after
        write_at: Any = expert_file_blocks._PWRITE

        def pwrite(*args: Any) -> Any:
            self.count()
            return write_at(*args)

        def fsync(descriptor: int) -> None:
            self.count()

        monkeypatch.setattr(expert_file_blocks, "_PWRITE", pwrite)
        monkeypatch.setattr(os, "fsync", fsync)

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(expert_file_blocks._PWRITE is None, reason="the writes are counted at pwrite")
def test_a_disk_that_is_full_at_any_write_is_named_and_given_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header()
    failures = 0
    for after in range(200):
        with monkeypatch.context() as patch:
            full = FullDisk(patch, after)
            refused = refusal(path, header)
        if full.left >= 0:
            break
        if refused is None:  # the last sync is of the folder, and the file is whole by then
            check_whole(path, header)
            path.unlink()
            continue
        failures += 1
        assert "No space left" in refused.message
        assert str(path.parent) in refused.message
        assert refused.next_step.startswith("Free")
        assert list(path.parent.iterdir()) == []
    # The start, two writes per expert, the finished preamble and its sync.
    assert failures >= 2 * len(all_experts(header)) + 3
    check_whole(path, header)


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header()
    needed = places(header).size_bytes

    def with_free(free: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda folder: type("U", (), {"free": free}))

    with_free(needed * 105 // 100 - 1)
    with pytest.raises(DiskError, match=r"needs 0\.11 MB .*5 % .* 0\.11 MB are free"):
        write(path, header)
    assert list(path.parent.iterdir()) == []
    with_free(needed * 105 // 100)
    write(path, header, 6)
    place = places(header)
    there = sum(place.stride[expert.layer] for expert in all_experts(header)[:6])
    with_free((needed - there) * 105 // 100)  # what is there already does not count again
    write(path, header)
    check_whole(path, header)


def test_what_is_left_of_another_file_gives_its_space_back_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_header()
    disk_bytes = places(header).size_bytes * 105 // 100
    write(path, make_header(model="Another"), 6)

    def usage(folder: Path) -> Any:
        used = sum(one.stat().st_size for one in folder.iterdir())
        return type("U", (), {"free": disk_bytes - used})

    monkeypatch.setattr("shutil.disk_usage", usage)
    write(path, header)
    check_whole(path, header)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(path: Path) -> None:
    path.parent.mkdir(mode=0o500)
    with pytest.raises(DiskError, match="cannot be kept"):
        write(path, make_header())


def test_a_file_in_place_of_the_folder_is_named(path: Path) -> None:
    path.parent.write_bytes(b"")
    with pytest.raises(DiskError, match="cannot be kept"):
        write(path, make_header())


def test_only_one_writes_and_nothing_open_is_deleted(path: Path) -> None:
    header = make_header()
    write(path, header, 3)
    cache = path.parent
    first = ExpertFileWriter(path, header)
    with pytest.raises(DiskError, match="another PreScope"):
        ExpertFileWriter(path, header)
    with pytest.raises(BusyError, match="in use"):
        delete(cache, partial_path(path).name)
    first.close()
    write(path, header)
    file = opened(path, header)
    with pytest.raises(BusyError, match="in use"):
        delete(cache, path.name)
    again = opened(path, header)
    file.close()
    with pytest.raises(BusyError):
        delete(cache, path.name)
    again.close()
    for name in ("../experts", "..", "nothing.experts", str(path)):
        with pytest.raises(FileNotFoundError):
            delete(cache, name)
    delete(cache, path.name)
    assert kept_files(cache) == []


def test_the_list_tells_model_kind_size_and_state(path: Path) -> None:
    cache = path.parent
    assert kept_files(cache) == []
    write(path, make_header())
    second = cache / "b.int4.experts"
    write(second, make_header(kind="int4"), 2)
    (cache / "notes.txt").write_text("not ours")
    (cache / "folder.experts").mkdir()
    kept = kept_files(cache)
    assert [(k.model, k.kind, k.finished) for k in kept] == [
        ("Tiny é", "int4", False),
        ("Tiny é", "int8", True),
    ]
    assert kept[1].size_bytes > make_header().experts_bytes
    assert kept[0].size_bytes < kept[1].size_bytes


def test_the_source_is_known_by_its_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"123")
    os.utime(shard, ns=(5, 5))

    def now() -> ExpertFileHeader:
        return describe_source(
            tmp_path,
            [shard],
            model="m",
            kind="int8",
            quantiser="q",
            layers=make_header().layers,
        )

    before = now()
    assert now() == before
    assert before.sources == (SourceFile("model.safetensors", 3, 5),)
    os.utime(shard, ns=(6, 6))
    assert now() != before
    shard.write_bytes(b"1234")
    os.utime(shard, ns=(5, 5))
    assert now() != before
    shard.write_bytes(b"123")
    os.utime(shard, ns=(5, 5))
    assert now() == before
    (tmp_path / "config.json").write_text("{ }")
    assert now() != before


def test_every_model_folder_has_a_place_of_its_own(tmp_path: Path) -> None:
    made = set()
    for name in ("a/model", "b/model", "...", "mödel é", "x" * 200, "con\nfig"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for kind in ("int4", "int8"):
            path = file_path(tmp_path, folder, kind)
            assert path.parent == tmp_path
            assert path.name.isascii()
            assert len(path.name) < 120
            made.add(path)
    assert len(made) == 12


def how_many(path: Path, header: ExpertFileHeader) -> int:
    """Return how many experts the file, finished or not, has to offer."""
    if path.exists():
        return header.expert_count
    writer = ExpertFileWriter(path, header)
    sizes = [layer.format.size_bytes for layer in header.layers]
    found = [writer.read(e, memoryview(bytearray(sizes[e.layer]))) for e in all_experts(header)]
    writer.close()
    return sum(found)


_KILLED = """
import sys
from pathlib import Path
from tests.test_expert_file import make_header, write
print("begun", flush=True)
write(Path(sys.argv[1]), make_header())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is for POSIX")
def test_kill_9_at_any_moment_loses_nothing(path: Path, tmp_path: Path) -> None:
    """Twenty writers are killed, each at another write; the next takes up what they left."""
    header = make_header()
    slow = (
        "import time, random, runtime.expert_file_blocks as f\n"
        "plain = f._PWRITE\n"
        "def slowly(fd, data, at):\n"
        "    half = len(data) // 2\n"
        "    if half: plain(fd, data[:half], at)\n"
        "    time.sleep(0.004)\n"
        "    return half + plain(fd, data[half:], at + half)\n"
        "f._PWRITE = slowly\n"
    )
    chance = random.Random(11)
    killed = there = 0
    for _ in range(20):
        process = subprocess.Popen(
            [sys.executable, "-c", slow + _KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        time.sleep(chance.uniform(0.0, 0.06))
        process.kill()
        killed += process.wait() != 0
        process.stdout.close()
        before, there = there, how_many(path, header)
        assert there >= before, "what had been written was lost"
        if path.exists():
            check_whole(path, header)
            path.unlink()
            there = 0
    assert killed >= 15
    write(path, header)
    straight = tmp_path / "straight.int8.experts"
    write(straight, header)
    assert path.read_bytes() == straight.read_bytes()
    assert {p.name for p in path.parent.iterdir()} == {path.name}
