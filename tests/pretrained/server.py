"""A web server on this machine that misbehaves as told."""

import contextlib
import dataclasses
import hashlib
import http.server
import threading


@dataclasses.dataclass
class Site:
    """What the server has, how it behaves and what it was asked.

    Attributes:
      files: path -> content.
      break_after: bytes sent per answer before the connection breaks; one entry an answer, None:
        all of it. The last entry holds for all further answers.
      ranges: whether continuations are served.
      status: instead of the file, per answer; the last entry holds.
      validators: whether entity tags are told.
      md5: what is told as Google's storage does; None: nothing.
      hide_length: no Content-Length is told.
      asked: (path, Range header) of every request.
    """

    files: dict[str, bytes]
    break_after: list[int | None] = dataclasses.field(default_factory=lambda: [None])
    ranges: bool = True
    status: list[int] = dataclasses.field(default_factory=lambda: [200])
    validators: bool = True
    md5: str | None = None
    hide_length: bool = False
    asked: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)
    address: str = ""

    def tag(self, path: str) -> str:
        return f'"{hashlib.md5(self.files[path]).hexdigest()}"'


def _next(entries: list):
    return entries.pop(0) if len(entries) > 1 else entries[0]


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site: Site = self.server.site
        wanted = self.headers.get("Range")
        site.asked.append((self.path, wanted))
        status = _next(site.status)
        if status != 200:
            return self.send_error(status)
        if self.path not in site.files:
            return self.send_error(404)
        content, start = site.files[self.path], 0
        if wanted and site.ranges and self.headers.get("If-Range") == site.tag(self.path):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if not site.hide_length:
            self.send_header("Content-Length", str(len(content) - start))
        if site.validators:
            self.send_header("ETag", site.tag(self.path))
        if site.md5:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", f"md5={site.md5}")
        self.end_headers()
        sent = _next(site.break_after)
        self.wfile.write(content[start:] if sent is None else content[start : start + sent])
        self.close_connection = True

    def log_message(self, *arguments):
        del arguments


@contextlib.contextmanager
def serving(site: Site):
    """Serves a site on a free port; `site.address` is set."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.site = site
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
