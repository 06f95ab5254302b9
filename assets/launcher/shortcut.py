"""Something to double-click, in each system's own form.

All three remember the Python that made them, and look for another one if it has gone: a `.py` file
by itself opens an editor, or a store, on too many computers.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from assets.launcher.faults import from_os_error
from assets.launcher.places import ROOT, quietly

ICON = Path(__file__).with_name("icon")
MINORS = (14, 13, 12, 11, 10)


def create(
    beside: bool = False, system: str = sys.platform, home: Path | None = None
) -> list[Path]:
    """The files made: on the desktop (and in the applications menu on Linux), or beside
    launcher.py. Raises `FolderFault`."""
    home = home or Path.home()
    try:
        if system == "win32":
            folder = ROOT if beside else windows_desktop(home)
            return [_write(folder / "PreScope.bat", windows_batch(ROOT, sys.executable))]
        if system == "darwin":
            folder = ROOT if beside else home / "Desktop"
            return [_write(folder / "PreScope.command", mac_command(ROOT, sys.executable))]
        entry = linux_entry(ROOT, sys.executable)
        folders = [ROOT] if beside else [home / ".local/share/applications", home / "Desktop"]
        made = [
            _write(folder / "PreScope.desktop", entry)
            for folder in folders
            if beside or folder.name == "applications" or folder.is_dir()
        ]
        for file in made:
            _trust(file)
        return made
    except OSError as error:
        raise from_os_error("Making the shortcut", error) from error


def windows_batch(root: Path | str, python: str) -> str:
    """The console's own code page mangles names, so the file is UTF-8 and says so. A window that
    ends with a failure stays open to be read."""
    launcher, known = _batch(f"{root}\\launcher.py"), _batch(python)
    lines = ["@echo off", "chcp 65001 >nul", "title PreScope", f'cd /d "{_batch(str(root))}"']
    lines += [f'if exist "{known}" "{known}" "{launcher}" %* & goto ended']
    for candidate in ("py -3", "python", "python3"):
        # The Store's stand-in for python is there but fails, so each is tried first.
        lines += [f'{candidate} -c "" >nul 2>nul && ({candidate} "{launcher}" %* & goto ended)']
    lines += ["echo PreScope needs Python 3.10 to 3.14: https://www.python.org/downloads/"]
    lines += ["pause", "exit /b 1", ":ended", "if errorlevel 1 pause", ""]
    return "\r\n".join(lines)


def mac_command(root: Path | str, python: str) -> str:
    """/usr/bin/python3 comes last: on a bare Mac it opens the developer tools' installer."""
    names = " ".join(f"python3.{minor}" for minor in MINORS)
    launcher = shlex.quote(f"{root}/launcher.py")
    return (
        "#!/bin/sh\n"
        f"for python in {shlex.quote(python)} {names} python3; do\n"
        '  if "$python" -c "" 2>/dev/null; then\n'
        f'    exec "$python" {launcher} "$@"\n'
        "  fi\n"
        "done\n"
        'echo "PreScope needs Python 3.10 to 3.14: https://www.python.org/downloads/"\n'
    )


def linux_entry(root: Path | str, python: str) -> str:
    """With a terminal: closing it ends PreScope, and the person sees that it runs."""
    return (
        "[Desktop Entry]\n"
        "Type=Application\n"
        "Version=1.0\n"
        "Name=PreScope\n"
        "Comment=Chat with Mixture-of-Experts models on your own GPU\n"
        f"Exec={_entry_argument(python)} {_entry_argument(f'{root}/launcher.py')}\n"
        f"Icon={_entry_text(f'{root}/assets/launcher/icon/prescope.png')}\n"
        f"Path={_entry_text(str(root))}\n"
        "Terminal=true\n"
        "Categories=Science;Utility;\n"
    )


def windows_desktop(home: Path) -> Path:
    """The desktop may have been moved, to OneDrive for instance; the registry knows."""
    if sys.platform == "win32":
        import winreg

        key = r"Software\Microsoft\Windows\CurrentVersion\Explorer\User Shell Folders"
        try:
            with winreg.OpenKey(winreg.HKEY_CURRENT_USER, key) as shell_folders:
                value, _ = winreg.QueryValueEx(shell_folders, "Desktop")
            return Path(os.path.expandvars(value))
        except OSError:
            return home / "Desktop"
    else:
        return home / "Desktop"


def _batch(text: str) -> str:
    """In a batch file a per cent sign begins a variable, even between quotes."""
    return text.replace("%", "%%")


def _entry_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _entry_argument(text: str) -> str:
    """Quoted once for the command line of the entry, then once for the file it stands in."""
    for character in ("\\", '"', "`", "$"):
        text = text.replace(character, "\\" + character)
    return _entry_text('"' + text.replace("%", "%%") + '"')


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    path.chmod(0o755)
    return path


def _trust(entry: Path) -> None:
    """GNOME asks before it starts an entry from the desktop, unless it is marked so."""
    gio = shutil.which("gio")
    if gio is not None:
        command = [gio, "set", str(entry), "metadata::trusted", "true"]
        quietly(lambda: subprocess.run(command, capture_output=True, check=False))
