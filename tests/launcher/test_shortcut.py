from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from assets.launcher import shortcut
from assets.launcher.places import ROOT


def test_windows_gets_a_batch_file_that_survives_odd_paths() -> None:
    text = shortcut.windows_batch("C:\\Users\\Zoë 100%\\PreScope", "C:\\Python\\python.exe")
    lines = text.split("\r\n")
    assert lines[1] == "chcp 65001 >nul"
    assert 'cd /d "C:\\Users\\Zoë 100%%\\PreScope"' in lines
    assert 'if exist "C:\\Python\\python.exe" "C:\\Python\\python.exe"' in text
    assert lines.index("pause") < lines.index(":ended")
    assert "if errorlevel 1 pause" in lines


def test_macos_gets_a_script_a_shell_accepts(tmp_path: Path) -> None:
    root = tmp_path / "it's here"
    root.mkdir()
    (root / "launcher.py").write_text("import sys; print('started', sys.argv[1:])")
    script = tmp_path / "PreScope.command"
    script.write_text(shortcut.mac_command(root, sys.executable))
    done = subprocess.run(["sh", str(script), "a b"], capture_output=True, text=True, check=True)
    assert done.stdout == "started ['a b']\n"


def test_macos_looks_for_another_python_when_its_own_has_gone(tmp_path: Path) -> None:
    (tmp_path / "launcher.py").write_text("print('started')")
    script = shortcut.mac_command(tmp_path, "/gone/python3")
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "started\n"


def test_linux_gets_an_entry_with_the_icon() -> None:
    text = shortcut.linux_entry("/opt/Pre $cope 100%", "/usr/bin/python3")
    assert text.startswith("[Desktop Entry]\n")
    assert 'Exec="/usr/bin/python3" "/opt/Pre \\\\$cope 100%%/launcher.py"\n' in text
    assert "Icon=/opt/Pre $cope 100%/assets/launcher/icon/prescope.png\n" in text


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("win32", ["Desktop/PreScope.bat"]),
        ("darwin", ["Desktop/PreScope.command"]),
        ("linux", [".local/share/applications/PreScope.desktop", "Desktop/PreScope.desktop"]),
    ],
)
def test_files_land_where_people_look(system: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "Desktop").mkdir()
    made = shortcut.create(system=system, home=tmp_path)
    assert made == [tmp_path / name for name in expected]
    for file in made:
        assert os.access(file, os.X_OK)
        assert str(ROOT) in shlex.quote(file.read_text(encoding="utf-8"))


def test_the_icon_is_there_in_every_form() -> None:
    assert (shortcut.ICON / "prescope.png").read_bytes().startswith(b"\x89PNG")
    assert (shortcut.ICON / "prescope.ico").read_bytes()[:4] == b"\0\0\1\0"
    assert (shortcut.ICON / "prescope.svg").read_text().startswith("<svg")
