"""A file on its way: which of its bytes are here, where they come from, what their digests are.

The bytes lie in `<file>.partial`. What nobody could tell from them stands in its sidecar,
`<file>.partial.json`: the address, the server's name for the version (ETag), the size, the
digests that the server promised, and the gaps. Several connections may fill gaps at once; the
digests follow the part without a gap, out of the system's memory of what was just written.
"""

import contextlib
import json
import os
import threading
import time
from pathlib import Path

from ..catalog import FileFacts
from ..checkpoints import BLOCK, Digests
from ..errors import NotEnoughRoom
from ..files import full_disk_named, partial_of, require_room
from .gaps import Gap, Gaps
from .response import Head

SIDECAR_SECONDS = 0.5  # the most that a killed process forgets, where there are several gaps
FULL = ("What has arrived is kept.", "Make room and run this again; it goes on from there.")


class Stale(Exception):
    """What a connection brings does not go with what is here: the file is begun anew, or was."""


class PartialFile:
    """The file `target` before it has its name; `url` is where it comes from, without secrets.

    Attributes:
        facts: what is published of it, and what the server promised where nothing is.
        size, etag: of the whole file, by the server; None when it did not say.
        have: bytes that are here.
        joined: whether they came in more than one answer.
        gaps: what is missing; none once nobody may write any more.

    Within a gap bytes are written from front to back, and the sidecar names a gap before anything
    is written behind it. So the file's length says how much of its last gap is filled, and one
    connection that is killed loses nothing.
    """

    def __init__(self, target: Path, url: str, facts: FileFacts):
        self.path = partial_of(target)
        self.sidecar = self.path.with_name(self.path.name + ".json")
        self.url, self._published = url, facts
        self._lock, self._file = threading.Lock(), None
        self._forget()
        # What does not fit, being of another source perhaps, goes with the first byte.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            self._resume(json.loads(self.sidecar.read_text(encoding="utf-8")))

    def _forget(self) -> None:
        self.facts, self.etag, self.size = self._published, None, None
        self.have, self.joined, self.gaps = 0, False, Gaps([Gap(0, None)])
        self._digests, self._hashed, self._written_at = None, 0, 0.0

    def _resume(self, saved: dict) -> None:
        """Take up what is here, by the sidecar's content; any error says that it does not fit."""
        status, promise = self.path.lstat(), FileFacts(None, saved.get("md5"), saved.get("sha256"))
        facts = filled_from(self.facts, promise)
        # A link, hard or soft, may be another name of a file of the reader's.
        is_ours = self.path.is_file() and not self.path.is_symlink() and status.st_nlink == 1
        # Without a validator or digest nobody could tell two versions in one file.
        names = [name for name in (saved["etag"], facts.md5, facts.sha256) if name is not None]
        names_version = any(names) and all(isinstance(name, str) for name in names)
        if not is_ours or not names_version or saved["url"] != self.url:
            raise ValueError("what is here may be another file")
        size, length = saved["size"], status.st_size
        if size is None:
            self.have, self.gaps = length, Gaps([Gap(length, None)])
        else:
            self.gaps = Gaps.after(saved.get("missing", [[0, size]]), size, length)
            self.have = size - sum(gap.stop - gap.start for gap in self.gaps)
        self.facts, self.etag, self.size = facts, saved["etag"], size
        self.joined = self.have > 0

    def restart(self) -> None:
        """Forget what is here; whoever still writes is told so."""
        with self._lock:
            self.close()
            # Removed, never emptied: the name may be a hard link to a file of the reader's.
            for path in (self.path, self.sidecar, partial_of(self.sidecar)):
                path.unlink(missing_ok=True)
            self._forget()

    def stop(self) -> None:
        """Write down what is here and let nobody write any more."""
        with self._lock:
            if self._file is not None:
                with contextlib.suppress(NotEnoughRoom):  # an older sidecar merely knows less
                    self._write_sidecar()
            self.gaps = Gaps()
            self.close()

    def close(self) -> None:
        """Close the file, if it is open; what is here stays known."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def begin(self, gap: Gap, head: Head, piece: int | None = None) -> None:
        """Make ready for the first byte of an answer; on disk, say where the bytes come from.

        Args:
            piece: bytes; what is missing of a file of two or more is cut into such pieces, so
                that others may help, where the server gives parts.

        Raises:
            Stale: what comes is another part than that of `gap`, or of another version.
            NotEnoughRoom: the whole file would not fit.
        """
        with self._lock:
            self._require(gap)
            etag, total, promise = head.validator, head.total_size, head.promise
            size = total if total is not None else promise.size or self.facts.size
            other_etag = etag and self.etag and etag != self.etag
            other_size = None not in (total, self.size) and total != self.size
            misplaced = head.first_byte != gap.start or (size is not None and size < gap.start)
            if misplaced or other_etag or other_size or (head.is_encoded and head.is_part):
                raise Stale("the server sent another part than the one asked for")
            require_room(self.path.parent, (size or 0) - self.have)
            if self._file is None:
                if self.have == 0:
                    self.path.unlink(missing_ok=True)
                self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            if etag and not head.is_encoded:
                self.etag = etag
            self.facts = filled_from(self.facts, promise)
            if self.size is None and size is not None:
                self.size = size
                self.gaps.end_at(size)
            if piece and head.gives_parts and (self.size or 0) >= 2 * piece:
                self.gaps.split(piece)
            self.joined |= self.have > 0 or len(self.gaps) > 1
            self._write_sidecar()

    def take(self) -> Gap | None:
        """Return the first gap that nobody fills, which is taken then; None if there is none."""
        with self._lock:
            return self.gaps.take()

    def write(self, gap: Gap, block: bytes) -> bool:
        """Put the next bytes of `gap` in their place; return whether it is filled.

        Raises:
            NotEnoughRoom: the disk is full; what is here is kept.
            Stale: the file was begun anew meanwhile.
        """
        with self._lock:
            self._require(gap)
            rest = memoryview(block)[: None if gap.stop is None else gap.stop - gap.start]
            while rest:
                with full_disk_named(self.path, *FULL):
                    count = os.pwrite(self._file, rest, gap.start)
                self.gaps.fill(gap, count)
                self.have, rest = self.have + count, rest[count:]
            return gap.start == gap.stop

    def finish(self, gap: Gap) -> None:
        """Take the end of an answer for the end of the file, where nobody had said its size."""
        with self._lock:
            self._require(gap)
            self.size = gap.start
            self.gaps.end_at(self.size)

    def _require(self, gap: Gap) -> None:
        if gap not in self.gaps:
            raise Stale("the file was given up, or begun anew")

    def _write_sidecar(self) -> None:
        """Replace the sidecar as a whole; unlike `write_whole` without a wait for the disk.

        It is written twice a second, and no power cut costs more than what the digests find.
        """
        saved = {"url": self.url, "etag": self.etag, "size": self.size}
        saved |= {"missing": self.gaps.spans(), "md5": self.facts.md5, "sha256": self.facts.sha256}
        unfinished = partial_of(self.sidecar)
        with full_disk_named(self.path, *FULL):
            unfinished.write_text(json.dumps(saved), encoding="utf-8")
        os.replace(unfinished, self.sidecar)
        self._written_at = time.monotonic()

    def follow(self) -> bool:
        """Hash the next bytes of the part without a gap, if there are; write down what has changed."""
        with self._lock:
            if self._file is None:
                return False
            if len(self.gaps) > 1 and time.monotonic() - self._written_at > SIDECAR_SECONDS:
                self._write_sidecar()
            front = next((gap.start for gap in self.gaps), self.size)
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
    known = {name: value for name, value in vars(facts).items() if value is not None}
    return FileFacts(**vars(more) | known)
