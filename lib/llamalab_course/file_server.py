"""A web server on this machine alone, for lessons and tests: honest, or at fault on purpose.

It serves one directory over real HTTP with ranges and validators (RFC 9110, sections 13 and 14),
and can be told to misbehave in the ways that servers in the wild do.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE = b"<!DOCTYPE html>\n<html><title>Sign in</title><body>Please sign in.</body></html>\n"
BLOCK = 1 << 18  # bytes a write


@dataclass
class Fault:
    """What goes wrong with one file. Several may be combined; `times` answers are at fault.

    Attributes:
        cut_after: bytes of the answer after which the connection breaks.
        reset: it breaks hard, so that what was on the way is lost as well.
        stall_after: bytes of the answer after which nothing more comes.
        flip_at: offset in the file of a byte of which one bit is changed.
        html: a web page comes with status 200 in place of the file.
        gzip: the answer is compressed, though nobody asked for that.
        chunked: it comes in chunks, without a word on its length.
        surplus: bytes of rubbish that follow the answer.
        garbage: bytes in place of any HTTP.
        ignore_range: the whole file comes with status 200, whatever range was asked for.
        ignore_if_range: the part comes, though the file is no longer the one it is a part of.
        wrong_range: another range comes than the one that was asked for.
        only_parts: the fault is kept for requests of a range.
        status: the answer's status in place of the file, as 503.
        retry_after: the header that goes with it, in seconds.
        redirect: the address that a 302 sends the reader to.
        new_etag: the file claims to be another version at each request.
        at_once: answers that may be under way at the same time; any other gets a 503.
        headers: what is said in place of the truth, as {"Content-Length": "7"}; "" says nothing.
        times: how many answers are at fault; None for all of them.
    """

    cut_after: int | None = None
    reset: bool = False
    stall_after: int | None = None
    flip_at: int | None = None
    html: bool = False
    gzip: bool = False
    chunked: bool = False
    surplus: int = 0
    garbage: bytes = b""
    ignore_range: bool = False
    ignore_if_range: bool = False
    wrong_range: bool = False
    only_parts: bool = False
    status: int | None = None
    retry_after: str = ""
    redirect: str = ""
    new_etag: bool = False
    at_once: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    times: int | None = None


@dataclass
class SeenRequest:
    """One request as the server saw it, and what it answered; `sent` counts the body's bytes."""

    method: str
    path: str
    range: str = ""
    status: int = 0
    sent: int = 0
    with_credentials: bool = False


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    directory: Path
    faults: dict[str, Fault]
    log: list[SeenRequest]
    rate: float | None
    stopping: threading.Event
    under_way = 0

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is part of the game, not worth a traceback."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        if self.server.rate:  # what lies in a large buffer would come faster than the rate
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        super().setup()

    def log_message(self, *args) -> None:
        """Requests go to the log that the caller holds, not to standard error."""

    def do_GET(self) -> None:
        name = unquote(urlsplit(self.path).path).lstrip("/")
        asked = self.headers.get("Range", "")
        self.seen = SeenRequest(self.command, name, asked)
        self.seen.with_credentials = "Authorization" in self.headers
        self.server.log.append(self.seen)
        self.server.under_way += 1
        try:
            self._respond(name, asked, self._fault(name, asked))
        finally:
            self.server.under_way -= 1

    do_HEAD = do_GET

    def _fault(self, name: str, asked: str) -> Fault:
        fault = self.server.faults.get(name, Fault())
        if fault.only_parts and not asked:
            return Fault()
        if fault.times is not None:
            fault.times -= 1
        return fault if fault.times is None or fault.times >= 0 else Fault()

    def _respond(self, name: str, asked: str, fault: Fault) -> None:
        path = (self.server.directory / name).resolve() if "\0" not in name else Path("/")
        if fault.garbage:
            self.wfile.write(fault.garbage)
            self.close_connection = True
        elif fault.at_once is not None and self.server.under_way > fault.at_once:
            self._answer(503, {}, fault)
        elif fault.redirect:
            self._answer(302, {"Location": fault.redirect}, fault)
        elif fault.status:
            wait = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._answer(fault.status, wait, fault)
        elif fault.html:
            self._answer(200, {"Content-Type": "text/html"}, fault, PAGE)
        elif not path.is_relative_to(self.server.directory) or not path.is_file():
            self._answer(404, {}, Fault())
        else:
            self._serve(path, fault, asked)

    def _serve(self, path: Path, fault: Fault, asked: str) -> None:
        status = path.stat()
        size, etag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if fault.new_etag:
            etag = f'"version-{len(self.server.log)}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        # If-Range: the part is wanted only if the file is still the one the first part came from.
        stale = self.headers.get("If-Range", etag) != etag and not fault.ignore_if_range
        if not match or match[0] == "bytes=-" or stale or fault.ignore_range:
            return self._answer(200, headers, fault, path, 0, size)
        if match[1]:
            start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
        else:
            start, stop = max(size - int(match[2]), 0), size  # the last so many bytes
        if start >= stop:
            return self._answer(416, {"Content-Range": f"bytes */{size}"}, fault)
        if fault.wrong_range:
            start //= 2
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self._answer(206, headers, fault, path, start, stop)

    def _answer(
        self,
        status: int,
        headers: dict,
        fault: Fault,
        body: Path | bytes = b"",
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        """Send bytes [start, stop) of `body`, or what the fault makes of them."""
        if fault.gzip:
            body = (body if isinstance(body, bytes) else body.read_bytes())[start:stop]
            packer = zlib.compressobj(wbits=31)
            body, start, stop = packer.compress(body) + packer.flush(), 0, None
            headers = headers | {"Content-Encoding": "gzip"}
        stop = len(body) if stop is None else stop
        told = {"Transfer-Encoding": "chunked"} if fault.chunked else {}
        told = told or {"Content-Length": str(stop - start)}
        self.seen.status = status
        self.send_response(status)
        told = headers | told | fault.headers
        for name, value in told.items():
            if value:
                self.send_header(name, value)
        if not (told.get("Content-Length") or fault.chunked):
            self.close_connection = True  # the end of the connection is the end of the file
        self.end_headers()
        if self.command == "HEAD":
            return
        ends = [n for n in (fault.cut_after, fault.stall_after) if n is not None]
        end = min([stop, *(start + n for n in ends)])
        with nullcontext() if isinstance(body, bytes) else open(body, "rb") as file:
            self._send(file, body, start, end, fault)
        if end < stop:
            if end - start == fault.stall_after:
                self.server.stopping.wait()
            self.close_connection = True
            if fault.reset:
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.rfile.close(), self.wfile.close(), self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)
        elif fault.chunked:
            self.wfile.write(b"0\r\n\r\n")
        if fault.surplus:
            self.wfile.write(b"?" * fault.surplus)
        length = fault.headers.get("Content-Length")
        if length and int(length) > stop - start:
            self.close_connection = True  # the promised rest never comes

    def _send(self, file, body, start: int, stop: int, fault: Fault) -> None:
        rate, began = self.server.rate, time.monotonic()
        block = BLOCK if not rate else max(1, min(BLOCK, int(rate / 50)))
        if file:
            file.seek(start)
        for at in range(start, stop, block):
            size = min(block, stop - at)
            piece = file.read(size) if file else body[at : at + size]
            if fault.flip_at is not None and at <= fault.flip_at < at + len(piece):
                piece = bytearray(piece)
                piece[fault.flip_at - at] ^= 1
            self.seen.sent += len(piece)  # before, so that whoever has the bytes finds them counted
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if fault.chunked else piece)
            if rate:
                time.sleep(max(0.0, began + (at + size - start) / rate - time.monotonic()))


@contextmanager
def serve_files(
    directory: str | Path,
    faults: dict[str, Fault] | None = None,
    log: list[SeenRequest] | None = None,
    rate: float | None = None,
) -> Iterator[str]:
    """Serve `directory` on 127.0.0.1 while the context lasts, and yield the base URL.

    `faults` says, by path inside the directory, what goes wrong; it may be changed meanwhile.
    Every request is appended to `log`. `rate` is the most that one connection gets, in bytes a
    second.
    """
    server = _Server(("127.0.0.1", 0), _Handler)
    server.directory = Path(directory).resolve()
    server.faults = {} if faults is None else faults
    server.log = [] if log is None else log
    server.rate = rate
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
