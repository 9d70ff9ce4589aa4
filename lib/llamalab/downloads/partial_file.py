"""A file on its way: which of its bytes are here, where they come from, what their digests are.

The bytes lie in `<file>.partial`. What nobody could tell from them stands beside it, in
`<file>.partial.json`: the address, the server's name for the version (ETag), the size, the
digests that the server promised, and the gaps. Several connections may fill gaps at once; the
digests follow the part without a gap, out of the system's memory of what was just written.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path

from ..catalog import FileFacts
from ..checkpoints import BLOCK, Digests
from ..errors import NotEnoughRoom
from ..files import full_disk_named

NOTE_SECONDS = 0.5  # the most that a killed process forgets, where there are several gaps


FULL = ("What has arrived is kept.", "Make room and run this again; it goes on from there.")


class Abandoned(Exception):
    """The gap is nobody's any more: the file was given up, or begun anew."""


@dataclass(eq=False)
class Gap:
    """Bytes [start, stop) that are not here; `stop` is None while the size is not known."""

    start: int
    stop: int | None
    taken: bool = False


class PartialFile:
    """The file `target` before it has its name; `url` is where it comes from, without secrets.

    Attributes:
        facts: what is published of it, and what the server promised where nothing is.
        size, etag: of the whole file, by the server; None when it did not say.
        have: bytes that are here.
        joined: whether they came in more than one answer.

    Within a gap bytes are written from front to back, and the note names a gap before anything
    is written behind it. So the file's length says how much of its last gap is filled, and one
    connection that is killed loses nothing.
    """

    def __init__(self, target: Path, url: str, facts: FileFacts):
        self.path = target.with_name(target.name + ".partial")
        self.note = target.with_name(target.name + ".partial.json")
        self.url, self._published = url, facts
        self._lock, self._file = threading.Lock(), None
        self._forget()
        try:
            self._resume(json.loads(self.note.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self._forget()  # what is here, of another source perhaps, goes with the first byte

    def _forget(self) -> None:
        self.facts, self.etag, self.size = self._published, None, None
        self.have, self.joined, self.gaps = 0, False, [Gap(0, None)]
        self._digests, self._hashed, self._noted = None, 0, 0.0

    def _resume(self, note: dict) -> None:
        status, size, etag = self.path.lstat(), note["size"], note["etag"]
        promise = FileFacts(None, note.get("md5"), note.get("sha256"))
        length = status.st_size
        # A link, hard or soft, may be another name of a file of the reader's.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise ValueError("not a file of ours")
        if not all(isinstance(text, str | None) for text in (etag, promise.md5, promise.sha256)):
            raise ValueError("these are no texts")
        gaps, have, end, filled = [], length if size is None else size, 0, 0
        for start, stop in note.get("missing", [[0, size]]) if size is not None else ():
            if not end <= index(start) <= index(stop) <= size:
                raise ValueError("these are no gaps")
            filled, end = start if start > end else filled, stop
            start = length if start < length <= stop else start
            have -= stop - start
            gaps += [Gap(start, stop)] if start < stop else []
        if size is None:
            gaps = [Gap(length, None)]
        elif length > size or length < (size if end < size else filled):
            raise ValueError("the length is not that of the note")
        facts = filled_from(self.facts, promise)
        # Without a validator or digest nobody could tell two versions in one file.
        if note["url"] != self.url or not (etag or facts.md5 or facts.sha256):
            raise ValueError("of unknown origin")
        self.facts, self.etag, self.size = facts, etag, size
        self.have, self.joined, self.gaps = have, have > 0, gaps

    def restart(self) -> None:
        """Forget what is here; whoever still writes is told so."""
        with self._lock:
            self.close()
            # Removed, never emptied: the name may be a hard link to a file of the reader's.
            self.path.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)
            self._forget()

    def stop(self) -> None:
        """Write down what is here and let nobody write any more."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(NotEnoughRoom):  # an older note merely knows less
                    self._write_note()
            self.gaps = []
            self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def begin(self, gap: Gap, etag: str | None, size: int | None, facts: FileFacts) -> None:
        """Make ready for the first byte of an answer; on disk, say where the bytes come from."""
        with self._lock:
            self._require(gap)
            if self.have == 0 and self._file is None:
                self.path.unlink(missing_ok=True)
            if self._file is None:
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            self.joined |= self.have > 0
            self.facts, self.etag = filled_from(self.facts, facts), etag or self.etag
            if self.size is None and size is not None:
                self.size, self.gaps[-1].stop = size, size
                if gap.start == size:
                    self.gaps.remove(gap)
            self._write_note()

    def take(self, piece: int | None) -> Gap | None:
        """Return the first gap that nobody fills, or its first `piece` bytes; None if there is none."""
        with self._lock:
            gap = next((gap for gap in self.gaps if not gap.taken), None)
            if gap is None:
                return None
            if piece and gap.stop is not None and gap.stop - gap.start > piece:
                self._split(gap, gap.start + piece)
            gap.taken = True
            return gap

    def share(self, gap: Gap, piece: int) -> None:
        """Leave to others what lies behind the next `piece` bytes of `gap`."""
        with self._lock:
            self._require(gap)
            if gap.stop - gap.start > piece:
                self._split(gap, gap.start + piece)

    def _split(self, gap: Gap, at: int) -> None:
        self.gaps.insert(self.gaps.index(gap) + 1, Gap(at, gap.stop))
        gap.stop = at
        self.joined = True
        self._write_note()

    def give_back(self, gap: Gap) -> None:
        gap.taken = False

    def write(self, gap: Gap, block: bytes) -> bool:
        """Put the next bytes of `gap` in their place; return whether it is filled.

        Raises:
            NotEnoughRoom: the disk is full; what is here is kept.
            Abandoned: the file was begun anew meanwhile.
        """
        with self._lock:
            self._require(gap)
            rest = memoryview(block)[: None if gap.stop is None else gap.stop - gap.start]
            while rest:
                with full_disk_named(self.path, *FULL):
                    count = os.pwrite(self._file, rest, gap.start)
                gap.start, self.have, rest = gap.start + count, self.have + count, rest[count:]
            if gap.start == gap.stop:
                self.gaps.remove(gap)
            return gap.start == gap.stop

    def finish(self, gap: Gap) -> None:
        """Take the end of an answer for the end of the file, where nobody had said its size."""
        with self._lock:
            self._require(gap)
            self.size = gap.start
            self.gaps.remove(gap)

    def _require(self, gap: Gap) -> None:
        if gap not in self.gaps:
            raise Abandoned()

    def _write_note(self) -> None:
        missing = [[gap.start, gap.stop] for gap in self.gaps]
        note = {"url": self.url, "etag": self.etag, "size": self.size, "missing": missing}
        note |= {"md5": self.facts.md5, "sha256": self.facts.sha256}
        unfinished = self.note.with_name(self.note.name + ".new")
        try:
            with full_disk_named(self.path, *FULL):
                unfinished.write_text(json.dumps(note), encoding="utf-8")
            os.replace(unfinished, self.note)
        finally:
            unfinished.unlink(missing_ok=True)
        self._noted = time.monotonic()

    def follow(self) -> bool:
        """Hash the next bytes of the part without a gap, if there are; note what has changed."""
        with self._lock:
            if self._file is None:
                return False
            if len(self.gaps) > 1 and time.monotonic() - self._noted > NOTE_SECONDS:
                self._write_note()
            front = self.gaps[0].start if self.gaps else self.size
        if self._digests is None:
            self._digests = Digests(k for k in ("md5", "sha256") if getattr(self.facts, k))
        # Whole blocks while there is more to come: many small ones cost more than the hashing.
        if front - self._hashed < (BLOCK if self.gaps else 1):
            return False
        block = os.pread(self._file, min(BLOCK, front - self._hashed), self._hashed)
        self._digests.update(block)
        self._hashed += len(block)
        return True

    def digests(self) -> dict[str, str] | None:
        """Return the digests of the whole file, or None where it has not been followed."""
        return self._digests.hexdigests() if self._digests else None


def filled_from(facts: FileFacts, more: FileFacts) -> FileFacts:
    """Return `facts` with what only `more` says."""
    return replace(
        facts,
        size=facts.size if facts.size is not None else more.size,
        md5=facts.md5 or more.md5,
        sha256=facts.sha256 or more.sha256,
    )
