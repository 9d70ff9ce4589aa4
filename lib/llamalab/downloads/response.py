"""What the head of an HTTP answer says of a file: its size, version, digests, and which part it is.

Everything here is a server's word: it is held against what is known, and never believed alone.
"""

from __future__ import annotations

import base64
import itertools
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from ..catalog import FileFacts
from ..errors import DownloadFailed
from .sources import NotHere, shown


class Again(Exception):
    """An attempt failed in a way that another may not; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Head:
    """What the head of an answer says of the file.

    Attributes:
        start: offset in the file of the first byte that comes; None if that makes no sense.
        size: of the whole file in bytes; None where it is not said.
        etag: what names this version of it; None where nothing does.
        promise: its size and digests by the server, or by the Hub that led to it.
        partial: whether a part of the file comes.
        gives_parts: whether the server would send a part on request.
        encoded: whether what comes are not the file's own bytes, but those compressed, say.
    """

    start: int | None = 0
    size: int | None = None
    etag: str | None = None
    promise: FileFacts = FileFacts()
    partial: bool = False
    gives_parts: bool = False
    encoded: bool = False

    @classmethod
    def of(cls, response: httpx.Response) -> Head:
        """Read the head of `response`."""
        partial, parts = response.status_code == 206, response.headers.get("Accept-Ranges")
        return cls(
            first_byte(response),
            total_size(response),
            validator_of(response),
            promised_facts(response),
            partial,
            partial or parts == "bytes",
            is_encoded(response),
        )

    def contradiction(self, known: FileFacts) -> str:
        """Return in what the answer is not what is known, or not one with itself; else nothing."""
        whole = FileFacts(None if self.partial else self.size)
        pairs = ((known, self.promise), (known, whole), (self.promise, whole))
        return next(filter(None, itertools.starmap(contradiction, pairs)), "")


def require_bytes(response: httpx.Response, url: str) -> None:
    """Raise what the answer's status means, unless it brings bytes or says that there are none.

    Raises:
        NotHere, Again, DownloadFailed: there is no such file; not now; not in this way.
    """
    status = response.status_code
    if status in (404, 410):
        raise NotHere()
    if status in (401, 403):
        raise NotHere(
            DownloadFailed(
                f"{shown(url)} was refused ({status}).",
                "The server wants to know who you are, or has no such file.",
                "Set HF_TOKEN for a repository you have access to, or check the address.",
            )
        )
    if status in (408, 425, 429) or status >= 500:
        raise Again(f"the server answered {status}", retry_after(response))
    if status not in (200, 206, 416):
        raise DownloadFailed(f"{shown(url)} was answered with status {status}.")


def is_encoded(response: httpx.Response) -> bool:
    """Whether what comes are not the file's own bytes, but those compressed, say."""
    return response.headers.get("Content-Encoding", "identity") != "identity"


def total_size(response: httpx.Response) -> int | None:
    """Return the size of the whole file, or None where the answer does not give it."""
    if is_encoded(response):  # that would be the size of something else
        return None
    header = "Content-Length" if response.status_code == 200 else "Content-Range"
    size = response.headers.get(header, "").rpartition("/")[2]
    return int(size) if re.fullmatch("[0-9]{1,18}", size) else None


def first_byte(response: httpx.Response) -> int | None:
    """Return the offset in the file of the first byte of an answer; None if it makes no sense."""
    if response.status_code == 200:
        return 0
    number, text = "([0-9]{1,18})", response.headers.get("Content-Range", "")
    span = re.fullmatch(rf"bytes {number}-{number}/({number}|[*])", text)
    sane = span and int(span[1]) <= int(span[2]) and (span[3] == "*" or int(span[2]) < int(span[3]))
    return int(span[1]) if sane else None


def validator_of(response: httpx.Response) -> str | None:
    """Return what names this version of the file; a weak ETag does not (RFC 9110, 13.1.5)."""
    etag, date = (response.headers.get(name, "") for name in ("ETag", "Last-Modified"))
    text = date if not etag or etag.startswith("W/") else etag
    return text if re.fullmatch("[ -~]{1,500}", text) else None  # else it could not be sent back


def contradiction(known: FileFacts, promised: FileFacts) -> str:
    """Return in what a server's promise is not what is known, as a cause, or nothing."""
    if known.size is not None and promised.size not in (None, known.size):
        return f"The server has {promised.size:,} bytes; {known.size:,} are expected."
    for kind in ("md5", "sha256"):
        old, new = getattr(known, kind), getattr(promised, kind)
        if old and new and old.lower() != new:
            return f"The server's file has the {kind} {new}; {old.lower()} is expected."
    return ""


def retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that the server asks to wait; the header is a number or a date."""
    text = response.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def promised_facts(response: httpx.Response) -> FileFacts:
    """Return the size and digests that a server, or the Hub that led to it, gives for the file.

    Read are the Hub's X-Linked-Size and X-Linked-ETag, which is a sha256 for large files, and
    the digests of RFC 9530, RFC 3230 and RFC 1864. An ETag alone promises nothing: it may look
    like an md5 and be something else.
    """
    size = md5 = sha256 = None
    for each in (*response.history, response):
        linked = each.headers.get("X-Linked-Size", "")
        size = size or (int(linked) if linked.isdecimal() else None)
        linked = each.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"').lower()
        sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
    if not is_encoded(response):
        headers = response.headers
        text = ",".join(headers.get(name, "") for name in ("Repr-Digest", "Digest"))
        if response.status_code == 200:  # of a part, it is the part's
            text += ",md5=" + headers.get("Content-MD5", "")
        for name, value in re.findall(r"([\w-]+)=:?([A-Za-z0-9+/]+=*)", text):
            if name.lower() == "sha-256":
                sha256 = sha256 or _hexadecimal(value, 32)
            elif name.lower() == "md5":
                md5 = md5 or _hexadecimal(value, 16)
    return FileFacts(size, md5, sha256)


def _hexadecimal(text: str, length: int) -> str | None:
    try:
        value = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return value.hex() if len(value) == length else None
