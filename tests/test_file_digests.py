"""A flipped bit is found where a digest is known, named, and not loaded."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from runtime.assembly import assemble
from runtime.config import DEFAULT_MODEL_DIR
from runtime.core import LoadProgress, LoadRequest
from runtime.errors import CancelledError, ModelError, ModelFilesError
from runtime.file_digests import known_digest, verify_files

CONTENT = bytes(range(256)) * 40_000


def silent(step: LoadProgress) -> None:
    pass


def never() -> bool:
    return False


def model(folder: Path, shards: int = 2) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"model-{number}.safetensors" for number in range(shards)]
    for number, path in enumerate(paths):
        path.write_bytes(CONTENT + bytes([number]))
    return paths


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def publish_beside(path: Path) -> None:
    path.with_name(path.name + ".sha256").write_text(f"{sha256(path)}  {path.name}\n")


def publish_as_the_hub(path: Path) -> None:
    notes = path.parent / ".cache" / "huggingface" / "download"
    notes.mkdir(parents=True, exist_ok=True)
    text = f"{'0' * 40}\n{sha256(path)}\n{time.time()}\n"
    (notes / f"{path.name}.metadata").write_text(text)


def publish_as_the_cache(path: Path) -> None:
    blobs = path.parent.parent.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    blob = blobs / sha256(path)
    path.rename(blob)
    path.symlink_to(blob)


WAYS = [publish_beside, publish_as_the_hub, publish_as_the_cache]


def flip(path: Path, at: int = 123_456) -> None:
    with path.resolve().open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("publish", WAYS)
def test_one_flipped_bit_is_found_and_the_file_named(publish: object, tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "commit"
    paths = model(folder)
    for path in paths:
        publish(path)  # type: ignore[operator]
    record = tmp_path / "data" / "digests.json"
    assert verify_files(folder, record, silent, never) == 2
    flip(paths[1])
    os.utime(paths[1], ns=(5, 5))
    for _ in range(2):  # the second time from the record
        with pytest.raises(ModelFilesError, match=r"model-1\.safetensors is damaged") as found:
            verify_files(folder, record, silent, never)
        assert "Download" in found.value.next_step


def test_a_file_is_hashed_once_and_again_when_it_changed(tmp_path: Path) -> None:
    paths = model(tmp_path / "m")
    for path in paths:
        publish_beside(path)
    record = tmp_path / "digests.json"
    read: list[int] = []

    def note(step: LoadProgress) -> None:
        read.append(step.done_bytes)
        assert step.total_bytes

    verify_files(tmp_path / "m", record, note, never)
    assert read == sorted(read)
    assert read[-1] == 2 * (len(CONTENT) + 1)
    read.clear()
    verify_files(tmp_path / "m", record, note, never)
    assert not read
    os.utime(paths[0], ns=(7, 7))
    verify_files(tmp_path / "m", record, note, never)
    assert read[-1] == len(CONTENT) + 1
    assert len(json.loads(record.read_text())["files"]) == 2


def test_what_is_no_digest_is_none(tmp_path: Path) -> None:
    (path,) = model(tmp_path, 1)
    beside = path.with_name(path.name + ".sha256")
    assert known_digest(path) is None
    for text in ("", "x", "0" * 63, "g" * 64, "\x00" * 5000, "0" * 40):
        beside.write_text(text)
        assert known_digest(path) is None
        assert verify_files(tmp_path, tmp_path / "r.json", silent, never) == 0
    beside.write_text(f"{'A' * 64} *x")
    assert known_digest(path) == "a" * 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"version": 9}',
        '{"version": 1, "files": [1]}',
        '{"version": 1, "files": {"x": ""}}',
    ],
)
def test_a_damaged_record_is_made_anew(text: str, tmp_path: Path) -> None:
    (path,) = model(tmp_path / "m", 1)
    publish_beside(path)
    record = tmp_path / "digests.json"
    record.write_text(text)
    assert verify_files(tmp_path / "m", record, silent, never) == 1
    assert len(json.loads(record.read_text())["files"]) == 1


def test_checking_can_be_stopped(tmp_path: Path) -> None:
    for path in model(tmp_path / "m"):
        publish_beside(path)
    asked = [0]

    def cancelled() -> bool:
        asked[0] += 1
        return asked[0] > 1

    with pytest.raises(CancelledError):
        verify_files(tmp_path / "m", tmp_path / "r.json", silent, cancelled)
    assert asked[0] <= 4


def test_a_damaged_model_is_not_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL_DIR, folder)
    weights = folder / "model.safetensors"
    publish_beside(weights)
    flip(weights, weights.stat().st_size - 1000)
    with pytest.raises(ModelFilesError, match=r"model\.safetensors is damaged"):
        assemble(LoadRequest(str(folder)), data=tmp_path / "data")


def test_a_model_that_cannot_run_is_not_hashed_first(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DEFAULT_MODEL_DIR, folder)
    publish_beside(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    said: list[LoadProgress] = []
    with pytest.raises(ModelError):
        assemble(LoadRequest(str(folder)), data=tmp_path / "data", progress=said.append)
    assert not [step for step in said if step.text.startswith("Checking")]


def test_a_disk_that_takes_no_record_fails_no_load(tmp_path: Path) -> None:
    (path,) = model(tmp_path / "m", 1)
    publish_beside(path)
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    for record in (tmp_path / "file" / "digests.json", tmp_path / "taken"):
        assert verify_files(tmp_path / "m", record, silent, never) == 1
        with pytest.raises(CancelledError):
            verify_files(tmp_path / "m", record, silent, lambda: True)
    assert not (tmp_path / "taken.new").exists()


def test_a_file_saved_again_after_its_download_is_another_one(tmp_path: Path) -> None:
    (path,) = model(tmp_path / "m", 1)
    publish_as_the_hub(path)
    path.write_bytes(b"fine-tuned")
    now_s = time.time()
    os.utime(path, (now_s + 5, now_s + 5))
    assert verify_files(tmp_path / "m", tmp_path / "r.json", silent, never) == 0
    os.utime(path, (now_s, now_s))
    with pytest.raises(ModelFilesError, match="damaged"):
        verify_files(tmp_path / "m", tmp_path / "r.json", silent, never)


def test_what_was_hashed_before_a_stop_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.file_digests._THREADS", 1)
    paths = model(tmp_path / "m")
    for path in paths:
        publish_beside(path)
    read = [0]

    def note(step: LoadProgress) -> None:
        read[0] = step.done_bytes

    first_bytes = paths[0].stat().st_size
    record = tmp_path / "r.json"
    with pytest.raises(CancelledError):
        verify_files(tmp_path / "m", record, note, lambda: read[0] >= first_bytes)
    assert list(json.loads(record.read_text())["files"].values()) == [sha256(paths[0])]
    assert verify_files(tmp_path / "m", record, note, never) == 2
    assert read[0] == paths[1].stat().st_size


def test_every_part_of_a_split_model_is_checked(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for path in parts:
        path.write_bytes(CONTENT)
        publish_beside(path)
    (tmp_path / "other.gguf").write_bytes(b"x")
    publish_beside(tmp_path / "other.gguf")
    assert verify_files(parts[0], tmp_path / "r.json", silent, never) == 3
    flip(parts[2])
    with pytest.raises(ModelFilesError, match="m-00003-of-00003.gguf is damaged"):
        verify_files(parts[0], tmp_path / "other.json", silent, never)
    many = tmp_path / "m-00001-of-99999.gguf"
    many.write_bytes(CONTENT)
    publish_beside(many)
    assert verify_files(many, tmp_path / "r.json", silent, never) == 1
