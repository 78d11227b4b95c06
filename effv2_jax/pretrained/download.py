"""Downloads over HTTP that survive broken connections and full disks. Imports no JAX.

Next to the file that is being fetched, FILE, lie meanwhile FILE.part with what has arrived and
FILE.part.json with what the server said of it (entity tag, date, length). Whoever starts again
continues there if the server still has the same file, and from the beginning if not.
"""

import base64
import contextlib
import errno
import hashlib
import http.client
import json
import os
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effv2_jax.errors import UserError

_CHUNK = 2**20
_TIMEOUT = 60.0  # seconds without a byte
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
_LINE_SECONDS = 30.0  # between two lines of progress where there is no terminal
_REFRESH_SECONDS = 0.1

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
# Asking again within seconds would not help.
_UNREACHABLE = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)


MIRROR = "EFFV2_MIRROR"
ELSEWHERE = f"set {MIRROR} to an address or a folder that has a copy"


class _Broken(Exception):
    """The connection ended before the file did; asking again may help."""


def download(url: str, path: Path, *, size: int | None = None) -> None:
    """Fetches a file; `path` exists only once it is complete.

    Args:
        url: http or https.
        path: where to; its folder exists.
        size: bytes the file must have; None: what the server says.

    Raises:
        UserError: the server does not have it or keeps breaking off, its length is wrong, there is
            no space, or the folder cannot be written to.
    """
    part = _Part(path, url)
    progress = Progress(path.name)
    failures, most = 0, part.size
    while True:
        try:
            md5 = _attempt(part, size, progress)
            break
        except _Broken as error:
            # An attempt that brings something new is no failure: the file grows.
            failures = 1 if part.size > most else failures + 1
            most = max(most, part.size)
            if failures > len(_PAUSES):
                raise UserError(
                    f"{url}: broken off after {_mb(part.size)} ({error}); start again to continue "
                    f"there, or {ELSEWHERE}"
                ) from None
            progress.say(f"broken off after {_mb(part.size)} ({error}); trying again")
            time.sleep(_PAUSES[failures - 1])
        except OSError as error:
            raise _cannot_write(error, part, url) from None
        finally:
            progress.end()
    if md5 and md5 != part.md5():
        part.restart()
        raise UserError(
            f"{url}: arrived damaged: its MD5 is not the one that the server told ({md5}); what "
            "had arrived is removed, start again"
        )
    part.finish()
    progress.done(path.stat().st_size)


class _Part:
    """What has arrived of a file, and what is known of the whole."""

    def __init__(self, path: Path, url: str) -> None:
        self.path, self.url = path, url
        self.file = path.with_name(f"{path.name}.part")
        self._note = path.with_name(f"{path.name}.part.json")
        self.known: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self._note.read_text())
            if known.get("url") == url:
                self.known = known
        if not self.known:
            self.restart()

    @property
    def size(self) -> int:
        """Bytes that have arrived."""
        return self.file.stat().st_size if self.file.exists() else 0

    @property
    def validator(self) -> str | None:
        """What the server must confirm for a continuation: the same file as before."""
        tag = self.known.get("etag")
        return tag if tag and not tag.startswith("W/") else self.known.get("last_modified")

    def restart(self) -> None:
        """Forgets what has arrived."""
        self.known = {}
        for file in (self.file, self._note):
            with contextlib.suppress(OSError):  # told when it is to be written
                file.unlink(missing_ok=True)

    def begin(self, headers: Mapping[str, str], total: int | None) -> None:
        """Notes what the server says of the whole file."""
        self.known = {
            "url": self.url,
            "etag": headers.get("ETag"),
            "last_modified": headers.get("Last-Modified"),
            "total": total,
        }
        self._note.write_text(json.dumps(self.known))

    def md5(self) -> str:
        """MD5 of what has arrived, base64 as in HTTP headers."""
        with open(self.file, "rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        return base64.b64encode(digest.digest()).decode()

    def finish(self) -> None:
        """Gives the complete file its name."""
        os.replace(self.file, self.path)
        self._note.unlink(missing_ok=True)


def _attempt(part: _Part, size: int | None, progress: "Progress") -> str | None:
    """Fetches what is missing; returns the MD5 that the server tells, if it does.

    Raises:
        _Broken: not all arrived.
        UserError: it never will.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "effv2_jax"}
    start = part.size if part.validator else 0
    total = part.known.get("total")
    if start and start != total:
        headers |= {"Range": f"bytes={start}-", "If-Range": part.validator}
    elif start:
        start = 0  # complete, but never given its name: cheaper to fetch than to explain
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(part.url, headers=headers), timeout=_TIMEOUT
        )
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # the file there is shorter now
            part.restart()
            raise _Broken("the server has another file now") from None
        if error.code in _TRY_AGAIN:
            raise _Broken(f"HTTP {error.code} {error.reason}") from None
        raise UserError(
            f"{part.url}: HTTP {error.code} {error.reason}; check the address, or {ELSEWHERE}"
        ) from None
    except (http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, _UNREACHABLE):
            raise UserError(
                f"{part.url}: cannot be reached ({reason}); without access to the net {ELSEWHERE}"
            ) from None
        raise _Broken(reason) from None
    with response:
        offset, total = _place(response, start)
        if offset and total != part.known.get("total"):
            part.restart()
            raise _Broken("the server has another file now")
        if size is not None and total is not None and total != size:
            raise UserError(
                f"{part.url}: has {total:,} bytes, expected {size:,}: not the released file; "
                f"{ELSEWHERE}"
            )
        if not offset:
            part.begin(response.headers, total)
        _check_space(part, offset, total)
        progress.start(part.url, offset, total)
        _receive(response, part, offset, total, progress)
    return _told_md5(response.headers)


def _place(response: http.client.HTTPResponse, start: int) -> tuple[int, int | None]:
    """Where the answer begins in the file, and how long the file is."""
    length = response.headers.get("Content-Length")
    if response.status != 206:  # the whole file: the server knows no ranges, or has a newer one
        return 0, int(length) if length else None
    unit, _, place = response.headers.get("Content-Range", "").partition(" ")
    first, total = place.partition("-")[0], place.rpartition("/")[2]
    if unit != "bytes" or first != str(start):
        raise _Broken(f"the server answered with {place or 'no range'} from byte {start}")
    return start, int(total) if total.isdigit() else None


def _receive(
    response: http.client.HTTPResponse,
    part: _Part,
    offset: int,
    total: int | None,
    progress: "Progress",
) -> None:
    with open(part.file, "r+b" if offset else "wb") as file:
        file.seek(offset)
        file.truncate()
        ended = False
        while not ended:
            try:
                chunk = response.read(_CHUNK)
            except http.client.IncompleteRead as error:
                chunk, ended = error.partial, True
            except (http.client.HTTPException, OSError) as error:
                raise _Broken(error) from None
            file.write(chunk)
            offset += len(chunk)
            progress.update(offset)
            ended = ended or not chunk
    if total is not None and offset != total:
        raise _Broken(f"{_mb(total)} expected")


def _told_md5(headers: http.client.HTTPMessage) -> str | None:
    """The MD5 of the file that Google's storage tells with every answer, base64."""
    told = ",".join(headers.get_all("x-goog-hash", []))
    if headers.get("x-goog-stored-content-encoding", "identity") != "identity":
        return None
    return dict(entry.strip().partition("=")[::2] for entry in told.split(",")).get("md5")


def _check_space(part: _Part, offset: int, total: int | None) -> None:
    free = shutil.disk_usage(part.file.parent).free
    if total is not None and total - offset > free:
        raise UserError(
            f"{part.file.parent}: no space: {part.path.name} needs {_mb(total - offset)} more, "
            f"{_mb(free)} are free; make room or choose another folder with XDG_CACHE_HOME"
        )


def _cannot_write(error: OSError, part: _Part, url: str) -> UserError:
    if error.errno in _NO_SPACE:
        return UserError(
            f"{part.file}: no space ({error.strerror}) after {_mb(part.size)} of {url}; make room "
            "and start again to continue there, or choose another folder with XDG_CACHE_HOME"
        )
    return UserError(f"{part.file}: cannot be written: {error.strerror or error}")


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


class Progress:
    """Says on standard error how a download goes: a bar in a terminal, else now and then a line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._live = sys.stderr.isatty()
        self._shown = False
        self._total: int | None = None
        self._began, self._first = time.monotonic(), 0
        self._next = 0.0

    def say(self, text: str) -> None:
        """Prints a line."""
        self.end()
        print(f"{self._name}: {text}", file=sys.stderr, flush=True)

    def start(self, url: str, offset: int, total: int | None) -> None:
        """Says what is fetched from where."""
        self._total, self._first, self._began = total, offset, time.monotonic()
        self._next = self._began + (0 if self._live else _LINE_SECONDS)
        size = "size unknown" if total is None else _mb(total)
        self.say(f"continuing at {_mb(offset)} of {size}" if offset else f"{url}, {size}")

    def update(self, done: int) -> None:
        """Shows how far it is, if it is time."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + (_REFRESH_SECONDS if self._live else _LINE_SECONDS)
        rate = (done - self._first) / max(now - self._began, 1e-3)
        text = f"{_mb(done)}, {rate / 1e6:.1f} MB/s"
        if self._total:
            share = done / self._total
            left = (self._total - done) / max(rate, 1)
            text = f"{share:4.0%} of {_mb(self._total)}, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
            if self._live:
                filled = round(share * 20)
                text = f"{'#' * filled}{'.' * (20 - filled)} {text}"
        if not self._live:
            self.say(text)
            return
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[2K{f'{self._name}: {text}'[:width]}", end="", file=sys.stderr, flush=True)
        self._shown = True

    def end(self) -> None:
        """Removes the bar."""
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._shown = False

    def done(self, size: int) -> None:
        """Says that all has arrived."""
        self.say(f"{_mb(size)} fetched")
