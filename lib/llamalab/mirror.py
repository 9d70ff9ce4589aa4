"""A web server on this machine alone, for lessons and tests: honest, or at fault on purpose.

It serves one directory over real HTTP with ranges and validators (RFC 9110, sections 13 and 14),
and can be told to misbehave in the ways that servers in the wild do.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from . import places
from .errors import NotFound

PAGE = b"<!DOCTYPE html>\n<html><title>Sign in</title><body>Please sign in.</body></html>\n"


@dataclass
class Fault:
    """What goes wrong with one file. Several may be combined; `times` answers are at fault.

    Attributes:
        cut_after: bytes of the answer after which the connection breaks.
        stall_after: bytes of the answer after which nothing more comes.
        flip_at: offset in the file of a byte of which one bit is changed.
        html: a web page comes with status 200 in place of the file.
        ignore_range: the whole file comes with status 200, whatever range was asked for.
        ignore_if_range: the part comes, though the file is no longer the one it is a part of.
        wrong_range: another range comes than the one that was asked for.
        status: the answer's status in place of the file, as 503.
        retry_after: the header that goes with it, in seconds.
        redirect: the address that a 302 sends the reader to.
        new_etag: the file claims to be another version at each request.
        times: how many answers are at fault; None for all of them.
    """

    cut_after: int | None = None
    stall_after: int | None = None
    flip_at: int | None = None
    html: bool = False
    ignore_range: bool = False
    ignore_if_range: bool = False
    wrong_range: bool = False
    status: int | None = None
    retry_after: str = ""
    redirect: str = ""
    new_etag: bool = False
    times: int | None = None


@dataclass
class Request:
    """One request as the server saw it, and what it answered; `sent` counts the body's bytes."""

    method: str
    path: str
    range: str = ""
    status: int = 0
    sent: int = 0
    with_credentials: bool = False


class _Server(ThreadingHTTPServer):
    directory: Path
    faults: dict[str, Fault]
    log: list[Request]
    stopping: threading.Event

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is part of the game, not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *args) -> None:
        """Requests go to the log that the caller holds, not to standard error."""

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range", "")
        self.seen = Request(self.command, name, asked)
        self.seen.with_credentials = "Authorization" in self.headers
        self.server.log.append(self.seen)
        fault = self.server.faults.get(name, Fault())
        if fault.times is not None:
            fault.times -= 1
            if fault.times < 0:
                fault = Fault()
        path = (self.server.directory / name).resolve()
        if fault.redirect:
            self._answer(302, {"Location": fault.redirect})
        elif fault.status:
            wait = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._answer(fault.status, wait)
        elif fault.html:
            self._answer(200, {"Content-Type": "text/html"}, PAGE)
        elif not path.is_relative_to(self.server.directory) or not path.is_file():
            self._answer(404, {})
        else:
            self._serve(path, fault, asked)

    do_HEAD = do_GET

    def _serve(self, path: Path, fault: Fault, asked: str) -> None:
        data = bytearray(path.read_bytes())
        if fault.flip_at is not None and fault.flip_at < len(data):
            data[fault.flip_at] ^= 1
        etag = f'"{path.stat().st_mtime_ns:x}-{len(data):x}"'
        if fault.new_etag:
            etag = f'"version-{len(self.server.log)}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        # If-Range: the part is wanted only if the file is still the one the first part came from.
        stale = self.headers.get("If-Range", etag) != etag and not fault.ignore_if_range
        if not match or match[0] == "bytes=-" or stale or fault.ignore_range:
            return self._answer(200, headers, data, fault)
        if match[1]:
            start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
        else:
            start, stop = max(len(data) - int(match[2]), 0), len(data)  # the last so many bytes
        if start >= stop:
            return self._answer(416, {"Content-Range": f"bytes */{len(data)}"})
        if fault.wrong_range:
            start //= 2
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return self._answer(206, headers, data[start:stop], fault)

    def _answer(self, status: int, headers: dict, body: bytes = b"", fault: Fault | None = None):
        self.seen.status = status
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = fault or Fault()
        ends = [end for end in (fault.cut_after, fault.stall_after) if end is not None]
        stop = min([len(body), *ends])
        for start in range(0, stop, 1 << 16):
            piece = body[start : min(start + (1 << 16), stop)]
            self.seen.sent += len(piece)  # before, so that whoever has the bytes finds them counted
            self.wfile.write(piece)
        if stop < len(body):
            if stop == fault.stall_after:
                self.server.stopping.wait()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serve(
    directory: str | Path,
    faults: dict[str, Fault] | None = None,
    log: list[Request] | None = None,
) -> Iterator[str]:
    """Serve `directory` on 127.0.0.1 while the context lasts, and yield the base URL.

    `faults` says, by path inside the directory, what goes wrong; it may be changed meanwhile.
    Every request is appended to `log`.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.directory = Path(directory).resolve()
    server.faults = {} if faults is None else faults
    server.log = [] if log is None else log
    server.stopping = threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def lab_source(log: list[Request] | None = None) -> Iterator[str]:
    """Serve the lab family of this checkout, and yield the base URL.

    Raises:
        NotFound: the package runs without its checkout.
    """
    directory = places.project_directory() / "data" / "lab"
    if not directory.is_dir():
        raise NotFound(
            "The lab family is not here.",
            "It lies in the checkout's data/lab, and llamalab was installed without its checkout.",
            "Clone the project and run llamalab from there.",
        )
    with serve(directory, log=log) as url:
        yield url
