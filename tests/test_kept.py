"""The list of kept experts: labels are made harmless, and deleting spares what is in use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.kept import KeptShelf
from app.ui_kept import KeptEvents
from runtime.errors import BusyError, ConfigError
from tests.test_expert_file import make_header, opened, write


def test_a_folder_that_is_not_there_is_an_empty_list(tmp_path: Path) -> None:
    assert KeptShelf(tmp_path)() == []
    KeptShelf(tmp_path).delete("gone.int4.experts")
    assert list(tmp_path.iterdir()) == []


def test_lines_are_labels_and_sizes(tmp_path: Path) -> None:
    hostile = "a\u202eb\n<b>" + "x" * 500
    write(tmp_path / "experts" / "a.int8.experts", replace(make_header(), model=hostile), 3)
    write(tmp_path / "experts" / "b.int8.experts", make_header())
    (tmp_path / "experts" / "c.int4.experts").write_bytes(b"junk")
    first, second, third = KeptShelf(tmp_path)()
    assert first.label.startswith("a\ufffdb\ufffd<b>x")
    assert len(first.label) == 120
    assert (first.kind, first.finished) == ("int8", False)
    assert (second.label, second.finished) == ("Tiny é", True)
    assert second.size_bytes > first.size_bytes > 0
    assert (third.label, third.kind, third.size_bytes) == ("A file that cannot be read", "", 4)
    for offer in (first, second, third):
        KeptShelf(tmp_path).delete(offer.name)
    assert KeptShelf(tmp_path)() == []


def test_a_file_in_use_stays_and_the_reason_is_said(tmp_path: Path) -> None:
    header = make_header()
    write(tmp_path / "experts" / "a.int8.experts", header)
    file = opened(tmp_path / "experts" / "a.int8.experts", header)
    with pytest.raises(BusyError, match="in use"):
        KeptShelf(tmp_path).delete("a.int8.experts")
    on = KeptEvents(KeptShelf(tmp_path))
    event: Any = SimpleNamespace(name="a.int8.experts")
    said = on.deleted(event)
    assert said["bad"]
    assert "in use" in said["text"]
    assert len(said["files"]) == 1
    file.close()
    now = on.deleted(event)
    assert (now["files"], now["text"], now["bad"]) == ([], "Deleted.", False)
    assert now["n"] != said["n"]
    assert on.listed()["text"] == ""


def test_what_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "experts" / "a.int8.experts", make_header())

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(ConfigError, match="Permission denied"):
        KeptShelf(tmp_path).delete("a.int8.experts")
