"""A web server on this machine alone, for lessons and tests: honest, or at fault on purpose.

It serves one directory over real HTTP with ranges and validators (RFC 9110, sections 13 and 14),
and can be told to misbehave in the ways that servers in the wild do.
"""

from __future__ import annotations

import gzip
import io
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
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
    under_way = 0

    def __init__(self, directory: str | Path, faults: dict, log: list, rate: float | None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = Path(directory).resolve()
        self.faults, self.log, self.rate = faults, log, rate
        self.stopping = threading.Event()

    def handle_error(self, request, client_address) -> None:
        """A client that has gone away is part of the game, not worth a traceback."""


@dataclass
class _Reply:
    """What is to be sent: bytes [start, stop) of `body`, which is a file or lies in memory."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: Path | bytes = b""
    start: int = 0
    stop: int = 0

    def open(self) -> BinaryIO:
        file = io.BytesIO(self.body) if isinstance(self.body, bytes) else open(self.body, "rb")
        file.seek(self.start)
        return file

    def gzipped(self) -> _Reply:
        with self.open() as file:
            body = gzip.compress(file.read(self.stop - self.start))
        headers = self.headers | {"Content-Encoding": "gzip"}
        return _Reply(self.status, headers, body, stop=len(body))


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
            self.fault = self._fault_of(name, asked)
            if self.fault.garbage:
                self.wfile.write(self.fault.garbage)
                self.close_connection = True
            else:
                self._send(self._reply_to(name, asked))
        finally:
            self.server.under_way -= 1

    do_HEAD = do_GET

    def _fault_of(self, name: str, asked: str) -> Fault:
        fault = self.server.faults.get(name, Fault())
        if fault.only_parts and not asked:
            return Fault()
        if fault.times is not None:
            fault.times -= 1
        return fault if fault.times is None or fault.times >= 0 else Fault()

    def _reply_to(self, name: str, asked: str) -> _Reply:
        fault = self.fault
        if fault.at_once is not None and self.server.under_way > fault.at_once:
            return _Reply(503)
        if fault.redirect:
            return _Reply(302, {"Location": fault.redirect})
        if fault.status:
            return _Reply(fault.status, {"Retry-After": fault.retry_after})
        if fault.html:
            return _Reply(200, {"Content-Type": "text/html"}, PAGE, stop=len(PAGE))
        path = (self.server.directory / name).resolve() if "\0" not in name else Path("/")
        if path.is_relative_to(self.server.directory) and path.is_file():
            return self._file_reply(path, asked)
        self.fault = Fault()
        return _Reply(404)

    def _file_reply(self, path: Path, asked: str) -> _Reply:
        """Return the file, or the part of it that was asked for."""
        fault, status = self.fault, path.stat()
        size, etag = status.st_size, f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
        if fault.new_etag:
            etag = f'"version-{len(self.server.log)}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
        # If-Range: the part is wanted only if the file is still the one the first part came from.
        stale = self.headers.get("If-Range", etag) != etag and not fault.ignore_if_range
        if not match or match[0] == "bytes=-" or stale or fault.ignore_range:
            return _Reply(200, headers, path, 0, size)
        if match[1]:
            start, stop = int(match[1]), min(int(match[2] or size) + 1, size)
        else:
            start, stop = max(size - int(match[2]), 0), size  # the last so many bytes
        if start >= stop:
            return _Reply(416, {"Content-Range": f"bytes */{size}"})
        if fault.wrong_range:
            start //= 2
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return _Reply(206, headers, path, start, stop)

    def _send(self, reply: _Reply) -> None:
        """Send `reply`, or what the fault makes of it."""
        fault = self.fault
        reply = reply.gzipped() if fault.gzip else reply
        length = reply.stop - reply.start
        framing = {"Transfer-Encoding": "chunked"} if fault.chunked else {}
        headers = reply.headers | (framing or {"Content-Length": str(length)}) | fault.headers
        self._send_head(reply.status, headers)
        if self.command == "HEAD":
            return
        limits = (length, fault.cut_after, fault.stall_after)
        sent = min(limit for limit in limits if limit is not None)
        self._send_body(reply, sent)
        if sent < length:
            self._break_off(stalls=sent == fault.stall_after)
        elif fault.chunked:
            self.wfile.write(b"0\r\n\r\n")
        if fault.surplus:
            self.wfile.write(b"?" * fault.surplus)
        if int(headers.get("Content-Length") or 0) > length:
            self.close_connection = True  # the promised rest never comes

    def _send_head(self, status: int, headers: dict[str, str]) -> None:
        self.seen.status = status
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        if not (headers.get("Content-Length") or self.fault.chunked):
            self.close_connection = True  # the end of the connection is the end of the file
        self.end_headers()

    def _send_body(self, reply: _Reply, length: int) -> None:
        """Send the first `length` bytes of `reply`, at the server's rate."""
        fault, rate, began = self.fault, self.server.rate, time.monotonic()
        block = BLOCK if not rate else max(1, min(BLOCK, int(rate / 50)))
        with reply.open() as file:
            for sent in range(0, length, block):
                piece = bytearray(file.read(min(block, length - sent)))
                flip = -1 if fault.flip_at is None else fault.flip_at - reply.start - sent
                if 0 <= flip < len(piece):
                    piece[flip] ^= 1
                self.seen.sent += len(piece)  # before: whoever has the bytes finds them counted
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if fault.chunked else piece)
                if rate:
                    time.sleep(max(0.0, began + (sent + len(piece)) / rate - time.monotonic()))

    def _break_off(self, stalls: bool) -> None:
        """End the connection in the middle of an answer; one that stalls first waits for us."""
        if stalls:
            self.server.stopping.wait()
        self.close_connection = True
        if self.fault.reset:
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.rfile.close(), self.wfile.close(), self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)


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
    faults, log = {} if faults is None else faults, [] if log is None else log
    server = _Server(directory, faults, log, rate)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()
