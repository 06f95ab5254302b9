"""Fetching one large file so that nothing already fetched is fetched again.

Bytes go to NAME.part as they arrive, unbuffered; whatever ends the process, the next one asks the
server for the rest. The file gets its name only when its sha256 is right.
"""

from __future__ import annotations

import hashlib
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from assets.launcher.faults import (
    CHECK_NETWORK,
    TRUST_HINT,
    InstallFault,
    NetworkFault,
    from_os_error,
)
from assets.launcher.places import replace

BLOCK_BYTES = 1 << 18
ATTEMPTS_WITHOUT_PROGRESS = 5
FIRST_PAUSE_S = 0.5
OK, PARTIAL, RANGE_NOT_SATISFIABLE = 200, 206, 416
WORTH_RETRYING = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True)
class Wheel:
    """A file an index offered. `size_bytes` is 0 where the server would not say."""

    project: str
    version: str
    url: str
    sha256: str
    size_bytes: int = 0

    @property
    def file_name(self) -> str:
        """Only ever a name: an index must not choose the folder."""
        return re.split(r"[/\\]", urllib.parse.unquote(self.url.split("#")[0]))[-1]

    @property
    def local(self) -> Path | None:
        """The file itself, where the index is a folder of this computer."""
        parts = urllib.parse.urlsplit(self.url)
        return Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else None


class RefusedFault(NetworkFault):
    """This server will not serve us plainly (certificate, password); pip may know how to ask."""


class _Again(Exception):
    """Worth another attempt: the connection broke, or the server is busy."""


class Download:
    """One transfer of one wheel into a folder. `on_bytes(have, total)` hears of every block."""

    def __init__(
        self,
        wheel: Wheel,
        folder: Path,
        on_bytes: Callable[[int, int], None],
        timeout_s: float = 30.0,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self.wheel = wheel
        self.target = folder / wheel.file_name
        self.part = folder / (wheel.file_name + ".part")
        self.tag = folder / (wheel.file_name + ".etag")
        self._on_bytes = on_bytes
        self._timeout_s = timeout_s
        self._first_pause_s = first_pause_s
        self._total = wheel.size_bytes

    def fetch(self) -> Path:
        """The verified file. Raises `Fault`; what was fetched is kept for the next time, unless it
        was proven wrong."""
        if self.target.exists():
            return self.target
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._until_complete()
            if self._digest() != self.wheel.sha256:
                # Pieces of two versions of a file look like this too: once more, from nothing.
                self._forget()
                self._until_complete()
                self._verify()
            replace(self.part, self.target)
            self.tag.unlink(missing_ok=True)
        except OSError as error:
            raise from_os_error(f"Saving {self.wheel.file_name}", error) from error
        return self.target

    def _until_complete(self) -> None:
        failures, pause_s = 0, self._first_pause_s
        while True:
            before = self._have()
            try:
                self._attempt()
                return
            except _Again as error:
                progressed = self._have() > before
                failures = 1 if progressed else failures + 1
                pause_s = self._first_pause_s if progressed else min(8.0, pause_s * 2)
                if failures >= ATTEMPTS_WITHOUT_PROGRESS:
                    raise NetworkFault(
                        f"{self.wheel.file_name}: {error}; {self._have():,} of "
                        f"{self._total:,} bytes are here.",
                        CHECK_NETWORK,
                    ) from error
                time.sleep(pause_s)

    def _attempt(self) -> None:
        have = self._have()
        with self._open(have) as response:
            if response.status == RANGE_NOT_SATISFIABLE:
                # Everything is here already, or it is not a piece of this file: the digest tells.
                if self._digest() != self.wheel.sha256:
                    self._forget()
                    raise _Again("the server has a shorter file")
                return
            if response.status == OK:
                have = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                self._forget()
                raise _Again("the server sent another part of the file")
            length = response.headers.get("Content-Length")
            total = have + int(length) if length else 0
            self._total = total or self._total
            self._remember_tag(response)
            self._receive(response, have)
            if total and self._have() < total:
                raise _Again("the connection was cut")

    def _open(self, have: int) -> HTTPResponse:
        headers = {"User-Agent": "PreScope-launcher", "Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if self.tag.exists():
                headers["If-Range"] = self.tag.read_text(encoding="ascii")
        request = urllib.request.Request(self.wheel.url.split("#")[0], headers=headers)
        try:
            opened: HTTPResponse = urllib.request.urlopen(
                request, timeout=self._timeout_s, context=trust()
            )
            return opened
        except urllib.error.HTTPError as error:
            if error.code == RANGE_NOT_SATISFIABLE:
                return error  # type: ignore[return-value]  # it has the same face as a response
            raise self._http_fault(error.code) from error
        except (OSError, HTTPException) as error:
            raise connection_fault(self.wheel.url, error) from error

    def _http_fault(self, status: int) -> Exception:
        host = urllib.parse.urlsplit(self.wheel.url).hostname
        if status in WORTH_RETRYING:
            return _Again(f"{host} answered {status}")
        return RefusedFault(f"{host} answered {status} for {self.wheel.file_name}.", CHECK_NETWORK)

    def _receive(self, response: HTTPResponse, have: int) -> None:
        with self.part.open("ab" if have else "wb", buffering=0) as file:
            while True:
                try:
                    # Whatever has arrived, not a whole block: a silence would lose the rest.
                    block = response.read1(BLOCK_BYTES)
                except (OSError, HTTPException) as error:
                    raise _Again(f"the connection broke ({error})") from error
                if not block:
                    return
                file.write(block)
                have += len(block)
                self._on_bytes(have, self._total)

    def _remember_tag(self, response: HTTPResponse) -> None:
        """Only a strong ETag can vouch that two pieces are of one file."""
        tag = response.headers.get("ETag", "")
        if tag and not tag.startswith("W/") and tag.isascii():
            self.tag.write_text(tag, encoding="ascii")
        else:
            self.tag.unlink(missing_ok=True)

    def _have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _digest(self) -> str:
        digest = hashlib.sha256()
        with self.part.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()

    def _verify(self) -> None:
        found = self._digest()
        if found != self.wheel.sha256:
            self._forget()
            raise InstallFault(
                f"{self.wheel.file_name} was refused: its sha256 is {found[:16]}..., the index "
                f"says {self.wheel.sha256[:16]}...",
                "The server or something on the way changed the file. Try another network.",
            )

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.tag.unlink(missing_ok=True)


def connection_fault(url: str, error: Exception) -> Exception:
    """Certificates are a matter for the person (or pip); anything else may pass by itself."""
    reason = getattr(error, "reason", error)
    if isinstance(reason, ssl.SSLError) and "CERTIFICATE" in str(reason).upper():
        host = urllib.parse.urlsplit(url).hostname
        return RefusedFault(f"The certificate of {host} is not trusted ({reason}).", TRUST_HINT)
    return _Again(str(reason) or type(reason).__name__)


def trust() -> ssl.SSLContext:
    """The system's certificates, and those the person gave pip."""
    context = ssl.create_default_context()
    extra = os.environ.get("PIP_CERT") or os.environ.get("REQUESTS_CA_BUNDLE")
    if extra and Path(extra).is_file():
        context.load_verify_locations(extra)
    return context


def remote_size(url: str, timeout_s: float = 10.0) -> int:
    """Bytes behind the URL, 0 where the server does not say; never raises."""
    request = urllib.request.Request(url.split("#")[0], method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=trust()) as response:
            return int(response.headers.get("Content-Length") or 0)
    except (OSError, HTTPException, ValueError):
        return 0
