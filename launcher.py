#!/usr/bin/env python3
"""Double-click me. Makes PreScope's own Python environment the first time, then opens the app.

    python3 launcher.py --help

This file only judges the Python it was started with, so it is written for very old ones too. The
launcher itself is in assets/launcher.
"""

import os
import sys

OLDEST = (3, 10)
TOO_NEW = (3, 15)


def objection(version, implementation, pointer_bits, free_threaded):
    """Why this Python will not do, or None."""
    found = ".".join(str(part) for part in version[:3])
    if implementation != "cpython":
        return "This is %s %s, and the packages PreScope needs are built for CPython." % (
            implementation,
            found,
        )
    if tuple(version[:2]) < OLDEST:
        return "This is Python %s, which is too old." % found
    if tuple(version[:2]) >= TOO_NEW:
        return "This is Python %s, which PreScope has not been made to work with yet." % found
    if pointer_bits < 64:
        return "This is a 32-bit Python %s, and PyTorch exists for 64 bits only." % found
    if free_threaded:
        return (
            "This is the free-threaded build of Python %s, which PyTorch lacks wheels for." % found
        )
    return None


def suitable_pythons():
    """Commands on PATH that look like a Python that will do, newest first."""
    suffix = ".exe" if os.name == "nt" else ""
    folders = os.environ.get("PATH", "").split(os.pathsep)
    found = []
    for minor in range(TOO_NEW[1] - 1, OLDEST[1] - 1, -1):
        name = "python3.%d%s" % (minor, suffix)
        if any(os.path.isfile(os.path.join(folder, name)) for folder in folders if folder):
            found.append(name)
    return found


def refuse(reason):
    lines = [
        "PreScope needs Python 3.10, 3.11, 3.12, 3.13 or 3.14 (64 bits). " + reason,
        "Running: " + (sys.executable or "unknown"),
    ]
    others = suitable_pythons()
    if others:
        lines.append("This one is installed here and will do: %s launcher.py" % others[0])
    else:
        lines.append("Get one at https://www.python.org/downloads/ and start launcher.py with it.")
    sys.stderr.write("\n".join(lines) + "\n")
    if os.name == "nt" and sys.stdin is not None and sys.stdin.isatty():
        sys.stderr.write("Press Enter to close this window.\n")
        sys.stdin.readline()
    return 2


def start():
    import sysconfig

    reason = objection(
        sys.version_info,
        getattr(getattr(sys, "implementation", None), "name", "cpython"),
        64 if sys.maxsize > 2**32 else 32,
        bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    )
    if reason:
        return refuse(reason)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from assets.launcher.cli import main

    return main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(start())
