"""What can go wrong before the app runs, told so that a person can act on it."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable


class Fault(Exception):
    """A failure with a next step. `str()` is what happened, `next_step` what the person can do."""

    def __init__(self, what: str, next_step: str) -> None:
        super().__init__(what)
        self.next_step = next_step

    def as_json(self) -> dict[str, dict[str, str]]:
        record = {"type": type(self).__name__, "message": str(self), "next_step": self.next_step}
        return {"error": record}


class FolderFault(Fault):
    """The data folder cannot be used."""


class NetworkFault(Fault):
    """A server cannot be reached, or it is not who it says it is."""


class InstallFault(Fault):
    """A package cannot be installed."""


class ConsentFault(Fault):
    """A large download was not agreed to."""


class AppFault(Fault):
    """The app did not start, or stopped."""


class Stopped(Exception):
    """The person asked the launcher to stop; not a failure."""


CHECK_NETWORK = "Check the network connection, then retry; what was downloaded so far is kept."
TRUST_HINT = (
    "A company proxy or antivirus may be opening secure connections. Give its certificate file in "
    "PIP_CERT, or use another network, then retry."
)
MAKE_ROOM = "Free some space, or choose another folder with --data-dir, then retry."

# (what pip or the system prints, kind, what happened, next step); the first match wins.
KNOWN: tuple[tuple[str, type[Fault], str, str], ...] = (
    (
        r"no space left on device|errno 28|not enough space|disk quota exceeded",
        FolderFault,
        "The disk is full.",
        MAKE_ROOM,
    ),
    (
        r"certificate[ _]verify[ _]failed|sslcertverificationerror|self[- ]signed certificate",
        NetworkFault,
        "The package server's certificate is not trusted by this computer.",
        TRUST_HINT,
    ),
    (
        r"proxy authentication required|\b407\b",
        NetworkFault,
        "The proxy asks for a user name and password.",
        "Set HTTPS_PROXY to http://user:password@host:port, then retry.",
    ),
    (
        r"do not match the hashes|hash(es)? mismatch",
        InstallFault,
        "A package is not the file this version of PreScope was made with, and was refused.",
        "If you use a package mirror, try without it; otherwise retry later.",
    ),
    (
        r"name resolution|getaddrinfo failed|nodename nor servname|name or service not known"
        r"|network is unreachable|failed to establish a new connection|newconnectionerror"
        r"|connection refused|timed out|read timeout|connection reset|connection aborted"
        r"|nameresolutionerror|max retries exceeded",
        NetworkFault,
        "The package server cannot be reached.",
        CHECK_NETWORK,
    ),
    (
        r"no matching distribution found|could not find a version",
        InstallFault,
        "There is no build of a needed package for this computer and this Python.",
        "Try another Python between 3.10 and 3.14. Macs need macOS 14 and an Apple chip.",
    ),
    (
        r"permission denied|access is denied|being used by another process",
        FolderFault,
        "A file in the data folder cannot be written.",
        "Close other copies of PreScope, allow it in the antivirus program, then retry.",
    ),
)


def explained(doing: str, lines: Iterable[str]) -> Fault:
    """The fault behind a failed child's last lines; unknown ones are quoted."""
    kept = [line for line in lines if line.strip()]
    text = "\n".join(kept)
    for pattern, kind, what, next_step in KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            culprit = next((x for x in kept if re.search(pattern, x, re.IGNORECASE)), "")
            return kind(f"{doing}: {what} ({culprit.strip()[:300]})", next_step)
    last = " / ".join(kept[-3:]) or "it said nothing"
    return InstallFault(f"{doing} failed: {last[:500]}", "Look into the log, then retry.")


def from_os_error(doing: str, error: OSError) -> Fault:
    """The fault behind an operation on the data folder that the system refused."""
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", -1)):
        return FolderFault(f"{doing}: the disk is full ({error}).", MAKE_ROOM)
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return FolderFault(
            f"{doing}: not allowed ({error}).",
            "Choose a folder of your own with --data-dir or PRESCOPE_DATA_DIR.",
        )
    next_step = "Look into the log and retry, or choose another folder with --data-dir."
    return FolderFault(f"{doing}: {error}.", next_step)
