"""What the head of an HTTP answer says of a file: its size, version, digests, and which part it is.

Everything here is a server's word: it is held against what is known, and never believed alone.
"""

import base64
import re
import time
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


class Head:
    """The head of an answer, as far as it speaks of the file that was asked for.

    Attributes:
        is_encoded: whether what comes are not the file's own bytes, but those compressed, say.
        is_part: whether a part of the file comes.
        gives_parts: whether the server sends parts of the file to whoever asks for one.
    """

    def __init__(self, response: httpx.Response):
        self._response, self._headers = response, response.headers
        self._status = response.status_code
        self.is_encoded = self._headers.get("Content-Encoding", "identity") != "identity"
        self.is_part = self._status == 206
        self.gives_parts = self.is_part or self._headers.get("Accept-Ranges") == "bytes"

    def require_bytes(self, url: str) -> None:
        """Raise what the answer's status means, unless it brings bytes or says there are none.

        Raises:
            NotHere, Again, DownloadFailed: there is no such file; not now; not in this way.
        """
        if self._status in (404, 410):
            raise NotHere
        if self._status in (401, 403):
            fix = "Set HF_TOKEN for a repository you have access to, or check the address."
            raise NotHere from DownloadFailed(
                f"{shown(url)} was refused ({self._status}).", "", fix
            )
        if self._status in (408, 425, 429) or self._status >= 500:
            raise Again(f"the server answered {self._status}", self.retry_after)
        if self._status not in (200, 206, 416):
            raise DownloadFailed(f"{shown(url)} was answered with status {self._status}.")

    @property
    def retry_after(self) -> float | None:
        """The seconds that the server asks to wait; the header is a number or a date."""
        text = self._headers.get("Retry-After", "")
        try:
            if text.isdecimal():
                return int(text)
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (ValueError, OverflowError):
            return None

    @property
    def first_byte(self) -> int | None:
        """The offset in the file of the first byte that comes; None if it makes no sense."""
        if self._status == 200:
            return 0
        number, text = "([0-9]{1,18})", self._headers.get("Content-Range", "")
        span = re.fullmatch(rf"bytes {number}-{number}/({number}|[*])", text)
        total = float("inf") if not span or span[3] == "*" else int(span[3])
        return int(span[1]) if span and int(span[1]) <= int(span[2]) < total else None

    @property
    def total_size(self) -> int | None:
        """The size of the whole file in bytes; None where the answer does not give it."""
        if self.is_encoded:  # that would be the size of something else
            return None
        header = "Content-Length" if self._status == 200 else "Content-Range"
        size = self._headers.get(header, "").rpartition("/")[2]
        return int(size) if re.fullmatch("[0-9]{1,18}", size) else None

    @property
    def validator(self) -> str | None:
        """What names this version of the file; a weak ETag does not (RFC 9110, 13.1.5)."""
        etag, date = (self._headers.get(name, "") for name in ("ETag", "Last-Modified"))
        text = date if not etag or etag.startswith("W/") else etag
        return text if re.fullmatch("[ -~]{1,500}", text) else None  # it has to be sent back

    @property
    def promise(self) -> FileFacts:
        """The size and digests that the server, or the Hub that led to it, gives for the file.

        Read are the Hub's X-Linked-Size and X-Linked-ETag, which is a sha256 for large files, and
        the digests of RFC 9530, RFC 3230 and RFC 1864. An ETag alone promises nothing: it may
        look like an md5 and be something else.
        """
        size = md5 = sha256 = None
        for response in (*self._response.history, self._response):
            linked = response.headers.get("X-Linked-Size", "")
            size = size or (int(linked) if linked.isdecimal() else None)
            linked = response.headers.get("X-Linked-ETag", "").removeprefix("W/").strip('"').lower()
            sha256 = sha256 or (linked if re.fullmatch("[0-9a-f]{64}", linked) else None)
        if not self.is_encoded:
            text = ",".join(self._headers.get(name, "") for name in ("Repr-Digest", "Digest"))
            if self._status == 200:  # of a part, it is the part's
                text += ",md5=" + self._headers.get("Content-MD5", "")
            sha256 = sha256 or _digest(text, "sha-256=:?([a-z0-9+/]{43}=)")
            md5 = _digest(text, "md5=:?([a-z0-9+/]{22}==)")
        return FileFacts(size, md5, sha256)

    def contradiction(self, known: FileFacts) -> str:
        """Return in what the answer is not what is known, or not one with itself; else nothing."""
        whole = FileFacts(self.total_size if self._status == 200 else None)
        for facts, said in ((known, self.promise), (known, whole), (self.promise, whole)):
            if facts.size is not None and said.size not in (None, facts.size):
                return f"The server has {said.size:,} bytes; {facts.size:,} are expected."
            for kind in ("md5", "sha256"):
                old, new = getattr(facts, kind), getattr(said, kind)
                if old and new and old.lower() != new:
                    return f"The server's file has the {kind} {new}; {old.lower()} is expected."
        return ""


def _digest(text: str, pattern: str) -> str | None:
    """Return in hexadecimal what `pattern` finds in base64; a name before it is a whole word."""
    match = re.search(rf"(?<![\w-]){pattern}", text, re.ASCII | re.IGNORECASE)
    return base64.b64decode(match[1]).hex() if match else None
