"""Downloading: every file of a model comes to its place with the right bytes, or not at all.

Workers, one a connection, fill the gaps of a `Partial`; the thread that called waits for them,
hashes what has arrived and shows progress. A file gets its final name only when its size and
every known digest are right. Ranges and validators: RFC 9110, sections 13 and 14.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from .. import catalog
from ..catalog import FileFacts, Part, models_directory, sizes
from ..checkpoints import (
    bytes_arrived,
    checklist_facts,
    compare_file,
    diagnose_head,
    is_safe_relative,
    read_checklist,
)
from ..errors import DamagedFile, DownloadFailed, LabError, NotEnoughRoom, NotFound
from ..files import locked, require_room
from ..progress import bytes_bar, say
from ..reports import Row
from ..units import size_text
from .partial_file import Abandoned, Gap, PartialFile, filled_from
from .response import (
    contradiction,
    first_byte,
    promised_facts,
    retry_after,
    total_size,
    validator_of,
)
from .sources import NotHere, address, assign, cached, is_remote, require_online, shown

ATTEMPTS = 6  # in a row that bring nothing new, before we give up
STALL_SECONDS = 30.0  # silence after which a connection counts as dead
BACK_OFF_SECONDS = 1.0  # doubles with every attempt
LONGEST_WAIT = 60.0  # seconds; also bounds what a server may ask for with Retry-After
CONNECTIONS = 4  # at once for one large file, where the server gives parts of it
COPIED_BELOW = 64 << 20  # bytes of a local file; a larger one is linked
PIECE = 32 << 20  # bytes that a connection takes on; more than one is worth it from two pieces on
_certificates = functools.cache(httpx.create_ssl_context)  # reading them takes a while


class _Again(Exception):
    """This attempt failed in a way that another may not; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class _OtherVersion(Exception):
    """What the server sends does not go with what is here: the file has to be begun anew."""


def download(
    name: str,
    models_dir: str | os.PathLike = "",
    source: str | Iterable[str] = (),
    connections: int = CONNECTIONS,
) -> list[Path]:
    """Bring every part of `name`, a model or a part, to its directory; return the directories.

    Args:
        source: `[PART=]WHERE`, once or several times; WHERE is an http(s) URL,
            `hf:OWNER/REPO[@REVISION]` or a directory. Without `PART=` it is for every part that
            has no default source.
        connections: how many to use at once for one large file, at most.

    Files that are there and right are kept. `WHERE/PART/FILE` is tried, then `WHERE/FILE`,
    then the file's bare name.

    Raises:
        UsageError, NotFound, DamagedFile, DownloadFailed, NotEnoughRoom: nothing wrong is kept.
    """
    parts = catalog.parts_of(name)
    given = [source] if isinstance(source, str) else source
    wheres = assign(parts, [item for item in given if item])
    root = models_directory(models_dir)
    needed = sum(_needed(part, root / part.name) for part in parts if wheres[part.name])
    if needed > 0:
        free = size_text(require_room(root, needed))
        say(f"{name}: about {size_text(needed)} to download to '{root}', where {free} are free.")
    return [_bring(part, root / part.name, wheres[part.name], name, connections) for part in parts]


def _needed(part: Part, directory: Path) -> int:
    """Return the bytes that are still to come, an adapter's weights by arithmetic."""
    total = 0
    for name, facts in part.files.items():
        path, size = directory / name, facts.size
        base = catalog.parts().get(part.base)
        if size is None and base and name.startswith("adapter_model"):
            size = sizes.adapter_bytes(part, base.shape)
        if not path.is_file() or facts.size not in (None, path.stat().st_size):
            total += max(0, (size or 0) - bytes_arrived(path))
    return total


def _bring(part: Part, directory: Path, wheres: list[str], asked: str, connections: int) -> Path:
    """Bring the files of one part; those that are there and right are left alone."""
    if not part.files:
        raise NotFound(f"The catalogue lists no file of '{part.name}'.")
    forms = [lambda name: f"{part.name}/{name}", str, lambda name: name.rpartition("/")[2]]
    # Checklists first: what they say then holds for the other files too.
    lists = [name for name in part.files if name.endswith("checklist.chk")]
    total = sum(facts.size or 0 for facts in part.files.values())
    with bytes_bar(total or None, part.name) as bar:

        def wrong(names: Iterable[str], advance=None) -> dict:
            known = {name: _known(part, name, directory) for name in names}
            rows = [compare_file(directory / n, n, known[n], advance) for n in known]
            return {r.name: known[r.name] for r in rows if r.status in ("MISSING", "WRONG")}

        for names in (lists, [name for name in part.files if name not in lists]):
            wanted = wrong(names, bar.update)
            if not wanted:
                continue
            if not wheres:
                raise _no_source(part, directory, asked)
            with locked(directory):
                # Once more: another process may have brought them while we waited for the lock.
                for name, facts in wrong(wanted).items():
                    _bring_file(directory / name, name, facts, wheres, forms, bar, connections)
    return directory


def _known(part: Part, name: str, directory: Path) -> FileFacts:
    """Return the catalogue's facts of a file, with the md5 of the part's checklist."""
    if not is_safe_relative(name):
        raise DamagedFile(f"The file name '{name}' leads outside the part's directory.")
    facts = part.files[name]
    md5 = checklist_facts(directory)[0].get(name, FileFacts()).md5
    if facts.md5 and md5 and facts.md5.lower() != md5:
        raise DamagedFile(
            f"The checklist of '{part.name}' contradicts the published md5 of '{name}'.",
            "The checklist is damaged, or belongs to another version of the files.",
            f"Remove the checklist in '{directory}' and download again, from another source.",
        )
    return replace(facts, md5=facts.md5 or md5)


def _bring_file(target: Path, name: str, facts: FileFacts, wheres, forms, bar, connections) -> None:
    """Try every source, and in each every form of the path, the one that worked last first."""
    failure: LabError | None = None
    target.parent.mkdir(parents=True, exist_ok=True)
    for where in wheres:
        for place, form in {form(name): form for form in forms}.items():
            try:
                _bring_from(where, place, target, name, facts, bar, connections)
            except NotHere as error:
                failure = failure or error.failure
            except DamagedFile as error:
                failure = failure or error  # a page in place of a "404", perhaps
            else:
                forms.insert(0, forms.pop(forms.index(form)))
                return
    raise failure or NotFound(
        f"'{name}' was not found in {' or '.join(map(shown, wheres))}.",
        f"'{forms[0](name)}' was tried there, and the shorter forms of that path.",
        "Give the address of the directory that holds the file, as --source PART=WHERE.",
    )


def _bring_from(where: str, place: str, target: Path, name: str, facts, bar, connections) -> None:
    """Bring the file `place` of one source, out of the Hub's cache if it lies there."""
    if not is_remote(where):
        return _copy(Path(where).expanduser() / place, target, name, facts, bar)
    if where.startswith("hf:"):
        if held := cached(where, place):
            try:
                return _copy(held, target, name, facts, bar)
            except DamagedFile:
                say(f"'{place}' in the Hub cache is damaged; it is left there and fetched anew.")
        require_online(where, place)
    return _fetch(*address(where, place), target, name, facts, bar, connections)


def _copy(source: Path, target: Path, name: str, facts: FileFacts, bar) -> None:
    """Take a local file over: a small one as a copy, a large one as a second name where it can be.

    A second name costs no room, but whoever writes into the one file writes into the other.
    """
    if not source.is_file():
        raise NotHere()
    partial = PartialFile(target, str(source), facts)
    partial.restart()
    size = source.stat().st_size
    try:
        if size < COPIED_BELOW:
            raise OSError("not linked")
        os.link(source.resolve(), partial.path)
    except OSError:
        require_room(target.parent, size)
        shutil.copyfile(source, partial.path)
    _accept(partial, target, name, bar)


def _fetch(url: str, headers: dict, target: Path, name: str, facts, bar, connections: int) -> None:
    """Bring the file at a URL to its place, begun anew as often as the server changes it."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses, secrets too
    # A proxy that is set for the outside world cannot reach this machine's own loopback.
    own = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    timeout = httpx.Timeout(STALL_SECONDS)
    partial = PartialFile(target, shown(url), facts)
    furthest, fruitless, last_try = partial.have, 0, False
    options = {"verify": _certificates(), "follow_redirects": True, "trust_env": not own}
    with httpx.Client(timeout=timeout, **options) as client:
        request = functools.partial(_attempt, client, url, headers, partial, name)
        while True:
            before = bar.n
            try:
                _receive(request, partial, url, bar, connections)
            except _OtherVersion as error:
                fruitless = 0 if partial.have > furthest else fruitless + 1
                furthest = max(furthest, partial.have)
                if fruitless >= ATTEMPTS:
                    raise _gave_up(url, error, partial) from None
            except KeyboardInterrupt:
                say(
                    f"{partial.have:,} bytes of '{name}' are kept; the same download goes on there."
                )
                raise
            else:
                try:
                    return _accept(partial, target, name, bar)
                except DamagedFile:
                    # Pieces of two versions, perhaps: once more in one piece before we blame it.
                    if not partial.joined or last_try:
                        raise
                    last_try = True
            partial.restart()
            bar.update(before - bar.n)
            connections = 1


def _receive(request, partial: PartialFile, url: str, bar, connections: int) -> None:
    """Fill every gap of `partial`, over several connections where that is of use.

    The first worker's failures are the download's. Any other may fail without harm: it gives
    its gap back, and what it met the first will meet, too.
    """
    failures: list[BaseException] = []
    moved, seen = threading.Event(), 0

    def work(first: bool) -> None:
        try:
            _work(request, partial, url, PIECE if connections > 1 else None)
        except Abandoned:
            pass
        except BaseException as error:  # it belongs to the thread that waits for us
            if first or isinstance(error, (NotEnoughRoom, _OtherVersion)):
                failures.append(error)
        finally:
            moved.set()

    def start(first: bool) -> threading.Thread:
        # A daemon: one that waits for a silent server keeps nobody from leaving.
        thread = threading.Thread(target=work, args=(first,), daemon=True)
        thread.start()
        return thread

    threads = [start(True)]
    try:
        while partial.gaps and not failures:
            if not partial.follow():
                moved.wait(0.02)
                moved.clear()
            bar.update(partial.have - seen)
            seen = partial.have
            alive = [thread for thread in threads if thread.is_alive()]
            if not alive and partial.gaps and not failures:
                threads = [start(True)]
            elif len(threads) < connections and partial.size and len(partial.gaps) > len(threads):
                threads.append(start(False))
        while not failures and partial.follow():
            pass
        bar.update(partial.have - seen)
        if failures:
            raise failures[0]
    except BaseException:
        partial.stop()
        raise


def _work(request, partial: PartialFile, url: str, piece: int | None) -> None:
    """Fill one gap after another, and try again where another attempt may help."""
    fruitless = 0
    while gap := partial.take(piece):
        before = gap.start
        try:
            request(gap, piece)
            fruitless = 0
            continue
        except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
            raise DownloadFailed(f"{shown(url)} cannot be fetched.", f"{error}.") from None
        except (_Again, httpx.RequestError) as error:
            fruitless = 0 if gap.start > before else fruitless + 1
            if fruitless >= ATTEMPTS:
                raise _gave_up(url, error, partial) from None
            asked = getattr(error, "wait", None)
        finally:
            partial.give_back(gap)
        time.sleep(min(BACK_OFF_SECONDS * 2**fruitless if asked is None else asked, LONGEST_WAIT))


def _attempt(client, url, headers, partial: PartialFile, name: str, gap: Gap, piece: int | None):
    """Send one request and keep what comes; on return the gap is filled.

    Raises:
        _Again, httpx.RequestError: worth another attempt.
        _OtherVersion: what comes does not go with what is here.
        DamagedFile: the server offers something else; what has arrived before is kept.
    """
    ask = headers | {"Accept-Encoding": "identity"}
    if gap.start or gap.stop != partial.size:
        last = "" if gap.stop == partial.size else gap.stop - 1
        ask["Range"] = f"bytes={gap.start}-{last}"
        ask |= {"If-Range": partial.etag} if partial.etag else {}
    with client.stream("GET", url, headers=ask) as response:
        etag, promise = validator_of(response), promised_facts(response)
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        _require_answer(response, url)
        total = None if encoded else total_size(response)
        if response.status_code == 416 and total == gap.start and partial.size in (None, total):
            return partial.finish(gap)
        start = first_byte(response)
        chunks = response.iter_bytes() if encoded else response.iter_raw()
        first = next(chunks, b"")
        cause = diagnose_head(first, name) if start == 0 else None
        cause = cause or contradiction(partial.facts, promise)
        if response.status_code == 200:
            announced = filled_from(FileFacts(total), promise)
            cause = cause or contradiction(partial.facts, announced)
            cause = cause or contradiction(promise, FileFacts(total))
        if cause:
            raise _refused(name, url, cause)
        changed = partial.have and (
            (etag and partial.etag and etag != partial.etag)
            or (total is not None and partial.size is not None and total != partial.size)
        )
        if start != gap.start or changed or (encoded and response.status_code == 206):
            raise _OtherVersion("the server sent another part than the one asked for")
        size = total if total is not None else promise.size or partial.facts.size
        require_room(partial.path.parent, (size or 0) - partial.have)
        partial.begin(gap, None if encoded else etag, size, promise)
        parts = response.status_code == 206 or response.headers.get("Accept-Ranges") == "bytes"
        if piece and parts and gap.stop is not None and gap.stop >= 2 * piece:
            partial.share(gap, piece)
        for block in itertools.chain([first], chunks):
            if gap.start == gap.stop or partial.write(gap, block):
                return
    if gap.stop is not None:
        raise _Again("the connection was cut")
    partial.finish(gap)


def _require_answer(response: httpx.Response, url: str) -> None:
    """Raise what the answer's status means, unless it brings bytes or says that there are none."""
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
        raise _Again(f"the server answered {status}", retry_after(response))
    if status not in (200, 206, 416):
        raise DownloadFailed(f"{shown(url)} was answered with status {status}.")


def _gave_up(url: str, error: Exception, partial: PartialFile) -> DownloadFailed:
    return DownloadFailed(
        f"{shown(url)} could not be fetched: {str(error) or type(error).__name__}.",
        f"{ATTEMPTS} attempts in a row brought nothing new.",
        f"{partial.have:,} bytes are kept; run the same command to go on from there.",
    )


def _accept(partial: PartialFile, target: Path, name: str, bar) -> None:
    """Give a complete file its final name if its bytes are right; else remove it."""
    found = partial.digests()
    partial.close()
    try:
        row = compare_file(partial.path, name, partial.facts, bar.update, found)
        if row.status == "WRONG":
            raise _refused(name, partial.url, row.cause, row)
        if name.endswith("checklist.chk"):
            read_checklist(partial.path)
    except DamagedFile:
        partial.path.unlink(missing_ok=True)
        partial.note.unlink(missing_ok=True)
        raise
    with open(partial.path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial.path, target)
    partial.restart()


def _refused(name: str, source: str, cause: str, row: Row | None = None) -> DamagedFile:
    if row and row.expected:
        # One of the digests says enough here; 'verify' shows them all.
        expected, found = row.expected.split(", ")[0], row.found.split(", ")[0]
        cause = f"{cause} Expected {expected}; found {found}."
    return DamagedFile(
        f"'{name}' from {shown(source)} is not the published file, and was not kept.",
        cause,
        "Try again; if it stays so, the source is at fault: give another with --source PART=WHERE.",
    )


def _no_source(part: Part, directory: Path, asked: str) -> NotFound:
    missing = [name for name in part.files if not (directory / name).is_file()]
    lacks = f"missing or wrong: {', '.join(missing or part.files)}"
    if part.source == "lab":
        return NotFound(
            f"No source for '{part.name}' was given ({lacks}).",
            "It lies in the checkout's data/lab.",
            f"Run 'llamalab download {asked}' from the checkout.",
        )
    return NotFound(
        f"'{part.name}' has no default source ({lacks}).",
        "Meta's weights are under a licence: you bring a licensed copy, we ship and link none.",
        f"Run 'llamalab download {asked} --source {part.name}=WHERE', where WHERE is the "
        "directory, address or hf:OWNER/REPO of your copy.",
    )
