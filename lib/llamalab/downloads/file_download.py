"""One file on its way from one address to its place: asked for, received, judged, and named.

Workers, one a connection, fill the gaps of a `PartialFile`; the thread that called waits for them,
hashes what has arrived and shows progress. A file gets its final name only when its size and
every known digest are right. Ranges and validators: RFC 9110, sections 13 and 14.
"""

import contextlib
import functools
import itertools
import logging
import os
import queue
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

from ..catalog import FileFacts
from ..checkpoints import compare_file, diagnose_head, read_checklist
from ..errors import DamagedFile, DownloadFailed, NotEnoughRoom
from ..files import require_room
from ..progress import say, terminal_bar
from .gaps import Gap
from .partial_file import PartialFile, Stale
from .response import Again, Head
from .sources import shown

ATTEMPTS = 6  # in a row that bring nothing new, before we give up
STALL_SECONDS = 30.0  # silence after which a connection counts as dead
BACK_OFF_SECONDS = 1.0  # doubles with every attempt
LONGEST_WAIT = 60.0  # seconds; also bounds what a server may ask for with Retry-After
_certificates = functools.cache(httpx.create_ssl_context)  # reading them takes a while


@dataclass(eq=False)
class FileDownload:
    """One file on its way to its place.

    Attributes:
        target: where it belongs.
        name: its path inside the part, by which messages call it.
        facts: what is published of it.
        bar: progress, in bytes.
        connections: how many are used at once, at most.
        piece: bytes that a connection takes on; more than one is worth it from two pieces on.
        url: the http(s) address, or the path of a local file.
        headers: what is sent along with every request.
        partial: the file before it has its name.
    """

    target: Path
    name: str
    facts: FileFacts
    bar: terminal_bar
    connections: int
    piece: int
    url: str
    headers: dict[str, str]

    def __post_init__(self):
        self.partial = PartialFile(self.target, shown(self.url), self.facts)
        self._already_shown = self.bar.n

    def copy(self, linked_from: int) -> None:
        """Take the local file over; one of `linked_from` bytes or more by a hard link if it can be.

        A second name costs no room, but whoever writes into the one file writes into the other.

        Raises:
            DamagedFile: it is not the published file; it is left as it is.
            NotEnoughRoom: the disk has none for a copy.
        """
        source = Path(self.url)
        size = source.stat().st_size
        self.partial.restart()
        if size >= linked_from:
            with contextlib.suppress(OSError):  # no links here, or another disk
                os.link(source.resolve(), self.partial.path)
        if not self.partial.path.exists():
            require_room(self.target.parent, size)
            shutil.copyfile(source, self.partial.path)
        self._accept()

    def fetch(self) -> None:
        """Bring the file at the URL, begun anew as often as the server changes it.

        Raises:
            NotHere: the server has no such file, or refuses it.
            DamagedFile: what it has is not the published file.
            DownloadFailed, NotEnoughRoom: what has arrived is kept.
        """
        logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses, secrets too
        # A proxy that is set for the outside world cannot reach this machine's own loopback.
        own = httpx.URL(self.url).host in ("127.0.0.1", "localhost", "::1")
        options = {"verify": _certificates(), "follow_redirects": True, "trust_env": not own}
        with httpx.Client(timeout=httpx.Timeout(STALL_SECONDS), **options) as self._client:
            for attempt in range(ATTEMPTS):
                if attempt:
                    self.partial.restart()
                    self.connections = 1
                try:
                    self._receive()
                    # Pieces of two versions, perhaps: once more in one before we blame it.
                    return self._accept(blame=attempt > 1 or not self.partial.joined)
                except Stale as error:
                    failure = self._gave_up(error)
                except KeyboardInterrupt:
                    say(f"{self.partial.have:,} bytes of '{self.name}' are kept for the next time.")
                    raise
            raise failure

    def _receive(self) -> None:
        """Fill every gap, over several connections where that is of use.

        The first worker's failures are the download's. Any other may fail without harm: it gives
        its gap back, and what it met the first will meet, too.
        """
        partial, ended, started, working = self.partial, queue.SimpleQueue(), 0, 0
        missing = hashed = True
        try:
            while missing or hashed:
                missing, hashed = len(partial.gaps), partial.follow()
                self.bar.update(self._already_shown + partial.have - self.bar.n)
                if started < min(missing, self.connections if partial.size else 1):
                    # A daemon: one that waits for a silent server keeps nobody from leaving.
                    work = functools.partial(self._work, not started, ended)
                    threading.Thread(target=work, daemon=True).start()
                    started, working = started + 1, working + 1
                with contextlib.suppress(queue.Empty):
                    failure = ended.get(timeout=0.02 if missing and not hashed else 0)
                    working -= 1
                    started = started if working else 0
                    if failure:
                        raise failure
        finally:
            partial.stop()

    def _work(self, first: bool, ended: queue.SimpleQueue) -> None:
        try:
            self._fill_gaps()
            ended.put(None)
        except BaseException as error:  # it belongs to the thread that waits for us
            ended.put(error if first or isinstance(error, (NotEnoughRoom, Stale)) else None)

    def _fill_gaps(self) -> None:
        """Fill one gap after another, and try again where another attempt may help."""
        fruitless = 0
        while gap := self.partial.take():
            before = gap.start
            try:
                self._fill(gap)
                fruitless = 0
                continue
            except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
                raise DownloadFailed(f"{shown(self.url)} cannot be fetched.", f"{error}.") from None
            except (Again, httpx.RequestError) as error:
                fruitless = 0 if gap.start > before else fruitless + 1
                if fruitless >= ATTEMPTS:
                    raise self._gave_up(error) from None
                wait = getattr(error, "wait", None)
            finally:
                gap.taken = False  # another may take what is left of it
            wait = BACK_OFF_SECONDS * 2**fruitless if wait is None else wait
            time.sleep(min(wait, LONGEST_WAIT))

    def _fill(self, gap: Gap) -> None:
        """Send one request and keep what comes; on return the gap is filled.

        Raises:
            Again, httpx.RequestError: worth another attempt.
            Stale: what comes does not go with what is here.
            DamagedFile: the server offers something else; what has arrived before is kept.
        """
        partial, headers = self.partial, {**self.headers, "Accept-Encoding": "identity"}
        if gap.start or gap.stop != partial.size:
            last = "" if gap.stop == partial.size else gap.stop - 1
            headers["Range"] = f"bytes={gap.start}-{last}"
            headers |= {"If-Range": partial.etag} if partial.etag else {}
        with self._client.stream("GET", self.url, headers=headers) as response:
            head = Head(response)
            head.require_bytes(self.url)
            ends_here = response.status_code == 416 and head.total_size == gap.start
            if ends_here and partial.size is None:
                return partial.finish(gap)
            chunks = response.iter_bytes() if head.is_encoded else response.iter_raw()
            first = next(chunks, b"")
            page = diagnose_head(first, self.name) if head.first_byte == 0 else None
            if cause := page or head.contradiction(partial.facts):
                raise self._refused(cause)
            partial.begin(gap, head, self.piece if self.connections > 1 else None)
            for block in itertools.chain([first], chunks):
                if gap.start == gap.stop or partial.write(gap, block):
                    return
        if gap.stop is not None:
            raise Again("the connection was cut")
        partial.finish(gap)

    def _gave_up(self, error: Exception) -> DownloadFailed:
        what = f"{shown(self.url)} could not be fetched: {str(error) or type(error).__name__}."
        fix = f"{self.partial.have:,} bytes are kept; run the same command to go on from there."
        return DownloadFailed(what, f"{ATTEMPTS} attempts in a row brought nothing new.", fix)

    def _accept(self, blame: bool = True) -> None:
        """Give the complete file its final name if its bytes are right; else remove it.

        Raises:
            DamagedFile: it is not the published file; Stale in its place without `blame`.
        """
        partial, digests = self.partial, self.partial.digests()
        try:
            row = compare_file(partial.path, self.name, partial.facts, self.bar.update, digests)
            if row.status == "WRONG":
                seen = f" Expected {row.expected}; found {row.found}." if row.expected else ""
                raise self._refused(row.cause + seen)
            if self.name.endswith("checklist.chk"):
                read_checklist(partial.path)
        except DamagedFile as error:
            partial.restart()
            raise error if blame else Stale("its pieces do not fit together") from None
        with open(partial.path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial.path, self.target)
        partial.restart()

    def _refused(self, cause: str) -> DamagedFile:
        what = f"'{self.name}' from {shown(self.url)} is not the published file, and was not kept."
        fix = "Try again; if it stays so, give another source with --source PART=WHERE."
        return DamagedFile(what, cause, fix)
