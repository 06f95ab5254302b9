"""Opening the person's browser, where there is one."""

from __future__ import annotations

import os
import sys
import webbrowser


def has_desktop() -> bool:
    """Without one, Python would start a text browser in the launcher's own console."""
    named = any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"))
    return named or sys.platform in ("win32", "darwin")


def open_page(url: str) -> bool:
    """Whether a browser was started; the caller prints the address in any case."""
    if not has_desktop():
        return False
    try:
        return webbrowser.open(url)
    except (OSError, webbrowser.Error):
        return False
