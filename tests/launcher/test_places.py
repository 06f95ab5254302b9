from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest

from assets.launcher import places
from assets.launcher.faults import FolderFault
from assets.launcher.places import Places, data_folder, default_data_folder

HOME = Path("/home/ada")


@pytest.mark.parametrize(
    ("platform", "environ", "executable", "expected"),
    [
        ("linux", {}, "/usr", "/home/ada/.local/share/prescope"),
        ("linux", {"XDG_DATA_HOME": "/data"}, "/usr", "/data/prescope"),
        ("linux", {"XDG_DATA_HOME": "  "}, "/usr", "/home/ada/.local/share/prescope"),
        ("darwin", {}, "/usr", "/home/ada/Library/Application Support/PreScope"),
        ("win32", {"LOCALAPPDATA": "/L"}, "C:\\Python", "/L/PreScope"),
        ("win32", {}, "C:\\Python", "/home/ada/AppData/Local/PreScope"),
        ("win32", {"LOCALAPPDATA": "/L"}, "C:\\WindowsApps\\Python", "/home/ada/.prescope"),
    ],
)
def test_the_folder_is_where_the_system_keeps_such_things(
    platform: str, environ: dict[str, str], executable: str, expected: str
) -> None:
    assert default_data_folder(platform, environ, HOME, executable) == Path(expected)


def test_option_before_variable_before_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRESCOPE_DATA_DIR", "/from/variable")
    assert data_folder("/from/option") == Path("/from/option")
    assert data_folder(None) == Path("/from/variable")


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_the_folder_is_private(tmp_path: Path) -> None:
    made = Places(tmp_path / "deep" / "data")
    made.prepare()
    for folder in (made.data, made.run, made.logs):
        assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("number", "words"), [(errno.EROFS, "not allowed"), (errno.ENOSPC, "disk is full")]
)
def test_a_folder_that_cannot_be_written_is_named_with_the_reason_and_left_as_it_was(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    chosen = tmp_path / "data"
    with pytest.raises(FolderFault, match=words) as caught:
        Places(chosen).prepare()
    assert str(chosen) in str(caught.value)
    assert "--data-dir" in caught.value.next_step
    assert not chosen.exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="modes do not bind root")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FolderFault, match="not allowed"):
        Places(tmp_path).prepare()


@pytest.mark.parametrize("name", ["a file", "with:colon"])
def test_impossible_paths_are_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    with pytest.raises(FolderFault, match="a file|':'"):
        Places(tmp_path / name).prepare()


def test_a_record_is_replaced_whole_and_private(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    places.write_private_json(file, {"port": 1})
    places.write_private_json(file, {"port": 2})
    assert json.loads(file.read_text()) == {"port": 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]
    if os.name != "nt":
        assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "{half", "[1]", "\0"])
def test_a_damaged_record_reads_as_none(text: str, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    file.write_text(text)
    assert places.read_json(file) == {}
    assert places.read_json(tmp_path / "absent.json") == {}
