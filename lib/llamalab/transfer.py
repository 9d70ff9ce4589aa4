"""Downloading: every file of a model comes to its place with the right bytes, or not at all.

What arrives is kept in `<file>.partial`, with a note of where it came from in
`<file>.partial.json`, so that the next run goes on where this one stopped. A file gets its
final name only when size and digests are right. Ranges and validators: RFC 9110, 13 and 14.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx

from . import catalog, digest, places
from .catalog import FileFacts, Part
from .errors import DamagedFile, DownloadFailed, LabError, NotEnoughRoom, NotFound, UsageError
from .progress import bytes_bar

ATTEMPTS = 6  # in a row that bring nothing new, before we give up
STALL_SECONDS = 30.0  # silence after which a connection counts as dead
BACK_OFF_SECONDS = 1.0  # doubles with every attempt
LONGEST_WAIT = 60.0  # seconds; also bounds what a server may ask for with Retry-After


_certificates = functools.cache(httpx.create_ssl_context)  # reading them takes a while


class _NotHere(Exception):
    """There is no such file; another form of its path may be tried. `failure` says more."""

    def __init__(self, failure: LabError | None = None):
        super().__init__()
        self.failure = failure


class _Again(Exception):
    """This attempt failed in a way that another may not; `wait` is what the server asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


def download(
    name: str,
    models_dir: str | os.PathLike = "",
    sources: Iterable[str] = (),
    lab_url: str | None = None,
) -> list[Path]:
    """Bring every part of `name`, a model or a part, to its directory; return the directories.

    Args:
        sources: `[PART=]WHERE`; WHERE is an http(s) URL, `hf:OWNER/REPO[@REVISION]` or a
            directory. Without `PART=` it is for every part that has no default source.
        lab_url: where the parts lie whose default source is "lab".

    Files that are there and right are kept. `WHERE/PART/FILE` is tried, then `WHERE/FILE`,
    then the file's bare name.

    Raises:
        UsageError, NotFound, DamagedFile, DownloadFailed, NotEnoughRoom: nothing wrong is kept.
    """
    parts = catalog.parts_of(name)
    wheres = _assign(parts, [sources] if isinstance(sources, str) else sources, lab_url)
    return [
        _bring(part, places.part_directory(part.name, models_dir), wheres[part.name], name)
        for part in parts
    ]


def _assign(
    parts: tuple[Part, ...], sources: Iterable[str], lab_url: str | None
) -> dict[str, list[str]]:
    """Return {part name: its sources, to be tried in order}."""
    wheres: dict[str, list[str]] = {part.name: [] for part in parts}
    for source in sources:
        head, equals, tail = source.partition("=")
        named = bool(equals) and re.fullmatch(r"[\w.-]+", head) is not None
        if named and head not in wheres:
            known = ", ".join(wheres)
            raise UsageError(f"'{head}' is not a part of it.", f"The parts are {known}.")
        where = tail if named else source
        if not re.match(r"https?://[^/]|hf:[\w.-]+/[\w.-]+(@.+)?$", where):
            if re.match(r"[\w+.-]+://|hf:", where):
                scheme = where.partition(":")[0]
                raise UsageError(
                    f"A source that begins with '{scheme}:' cannot be read.",
                    "Only http:// and https:// addresses, hf:OWNER/REPO and directories can.",
                )
            if not Path(where).expanduser().is_dir():
                raise NotFound(f"There is no directory '{where}'.", "It was given as a source.")
        takers = [head] if named else [part.name for part in parts if part.source is None]
        if not takers:
            raise UsageError(
                f"The source {_shown(where)} is for no part.",
                "Every part has a default source, which only a named one replaces.",
                f"Write it as {parts[0].name}=WHERE to replace that of {parts[0].name}.",
            )
        for taker in takers:
            wheres[taker].append(where)
    for part in parts:
        default = lab_url if part.source == "lab" else part.source
        if default and not wheres[part.name]:
            wheres[part.name].append(default)
    return wheres


def _bring(part: Part, directory: Path, wheres: list[str], asked: str) -> Path:
    """Bring the files of one part; those that are there and right are left alone."""
    if not part.files:
        raise NotFound(f"The catalogue lists no file of '{part.name}'.")
    forms = [lambda name: f"{part.name}/{name}", str, lambda name: name.rpartition("/")[2]]
    # Checklists first: what they say then holds for the other files too.
    lists = [name for name in part.files if name.endswith("checklist.chk")]
    total = sum(facts.size or 0 for facts in part.files.values())
    with bytes_bar(total or None, part.name) as bar:
        for names in (lists, [name for name in part.files if name not in lists]):
            known = {name: _known(part, name, directory) for name in names}
            rows = [digest.judge(directory / n, n, known[n], bar.update) for n in names]
            wanted = [row.file for row in rows if row.status in ("MISSING", "WRONG")]
            if wanted and not wheres:
                raise _no_source(part, directory, asked)
            arrived = sum(_size(directory / f"{name}.partial") for name in wanted)
            _require_room(directory, sum(known[name].size or 0 for name in wanted) - arrived)
            for name in wanted:
                _bring_file(directory / name, name, known[name], wheres, forms, bar)
    return directory


def _known(part: Part, name: str, directory: Path) -> FileFacts:
    """Return the catalogue's facts of a file, with the md5 of the part's checklist."""
    if not digest.inside(name):
        raise DamagedFile(f"The file name '{name}' leads outside the part's directory.")
    facts = part.files[name]
    md5 = digest.checklist_facts(directory)[0].get(name, FileFacts()).md5
    if facts.md5 and md5 and facts.md5.lower() != md5:
        raise DamagedFile(
            f"The checklist of '{part.name}' contradicts the published md5 of '{name}'.",
            "The checklist is damaged, or belongs to another version of the files.",
            f"Remove the checklist in '{directory}' and download again, from another source.",
        )
    return replace(facts, md5=facts.md5 or md5)


def _bring_file(target: Path, name: str, facts: FileFacts, wheres: list[str], forms, bar) -> None:
    """Try every source, and in each every form of the path, the one that worked last first."""
    failure: LabError | None = None
    target.parent.mkdir(parents=True, exist_ok=True)
    for where in wheres:
        for form in tuple(forms):
            try:
                if re.match("https?://|hf:", where):
                    _fetch(*_address(where, form(name)), target, name, facts, bar)
                else:
                    _copy(Path(where).expanduser() / form(name), target, name, facts, bar)
            except _NotHere as error:
                failure = failure or error.failure
            except DamagedFile as error:
                failure = failure or error  # a page in place of a "404", perhaps
            else:
                forms.insert(0, forms.pop(forms.index(form)))
                return
    raise failure or NotFound(
        f"'{name}' was not found in {' or '.join(map(_shown, wheres))}.",
        f"'{forms[0](name)}' was tried there, and the shorter forms of that path.",
        "Give the address of the directory that holds the file, as --source PART=WHERE.",
    )


def _address(where: str, place: str) -> tuple[str, dict[str, str]]:
    """Return the URL of `place` in a source, and the headers that go with it."""
    if where.startswith("hf:"):
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        repository, _, revision = where.removeprefix("hf:").partition("@")
        headers = build_hf_headers(library_name="llamalab")
        return hf_hub_url(repository, place, revision=revision or None), headers
    parts = urlsplit(where)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{quote(place)}", fragment="").geturl(), {}


def _shown(where: str) -> str:
    """Return a source or URL without what may be secret: user, password and query."""
    if not where.startswith(("http://", "https://")):
        return where
    parts = urlsplit(where)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _copy(source: Path, target: Path, name: str, facts: FileFacts, bar) -> None:
    if not source.is_file():
        raise _NotHere()
    partial = _Partial(target, str(source), facts)
    partial.restart()
    _require_room(target.parent, source.stat().st_size)
    try:
        os.link(source.resolve(), partial.path)  # no second copy on the same disk
    except OSError:
        shutil.copyfile(source, partial.path)
    _accept(partial, target, name, None, bar)


class _Partial:
    """A file on its way: how many bytes are here, their digests so far, and whose they are."""

    def __init__(self, target: Path, url: str, facts: FileFacts):
        self.path = target.with_name(target.name + ".partial")
        self.note = target.with_name(target.name + ".partial.json")
        self.url, self.facts = _shown(url), facts
        self._begin(None, None)
        try:
            held = json.loads(self.note.read_text(encoding="utf-8"))
            # Without a validator or digest nobody could tell two versions in one file.
            trusted = held["url"] == self.url and (held["etag"] or facts.md5 or facts.sha256)
            if not trusted or not self.path.is_file():
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            return  # what is here, of another source perhaps, goes when the first byte comes
        self._begin(held["etag"], held["size"])
        with open(self.path, "rb") as file:
            while block := file.read(digest.BLOCK):
                self._count(block)

    def _begin(self, etag: str | None, size: int | None) -> None:
        self.have, self.etag, self.size, self.joined = 0, etag, size, False
        self.hashers = {k: hashlib.new(k) for k in ("md5", "sha256") if getattr(self.facts, k)}

    def _count(self, block: bytes) -> None:
        self.have += len(block)
        for hasher in self.hashers.values():
            hasher.update(block)

    def restart(self) -> int:
        """Forget what is here; return how many bytes that were."""
        lost = self.have
        # Removed, never emptied: the name may be a hard link to a file of the reader's.
        self.path.unlink(missing_ok=True)
        self.note.unlink(missing_ok=True)
        self._begin(None, None)
        return lost

    def write_note(self) -> None:
        """Say on disk, before the bytes come, where they come from."""
        text = json.dumps({"url": self.url, "etag": self.etag, "size": self.size})
        unfinished = self.note.with_name(self.note.name + ".new")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, self.note)

    def write(self, file, block: bytes) -> None:
        try:
            file.write(block)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughRoom(
                    f"The disk is full at '{self.path}'.", "", "Make room and run this again."
                ) from None
            raise
        self._count(block)


def _fetch(url: str, headers: dict, target: Path, name: str, facts: FileFacts, bar) -> None:
    """Stream a URL to its place, over as many connections in a row as it takes."""
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole addresses, secrets too
    # A proxy that is set for the outside world cannot reach this machine's own loopback.
    own = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    timeout = httpx.Timeout(STALL_SECONDS)
    partial = _Partial(target, url, facts)
    bar.update(partial.have)
    furthest, fruitless, last_try = partial.have, 0, False
    options = {"verify": _certificates(), "follow_redirects": True, "trust_env": not own}
    with httpx.Client(timeout=timeout, **options) as client:
        while True:
            try:
                _attempt(client, url, headers, partial, name, bar)
            except (httpx.UnsupportedProtocol, httpx.TooManyRedirects, httpx.InvalidURL) as error:
                raise DownloadFailed(f"{_shown(url)} cannot be fetched.", f"{error}.") from None
            except (_Again, httpx.TransportError) as error:
                fruitless = 0 if partial.have > furthest else fruitless + 1
                furthest = max(furthest, partial.have)
                if fruitless >= ATTEMPTS:
                    raise DownloadFailed(
                        f"{_shown(url)} could not be fetched: {str(error) or type(error).__name__}.",
                        f"{ATTEMPTS} attempts in a row brought nothing new.",
                        f"{partial.have:,} bytes are kept; run the same command to go on from there.",
                    ) from None
                asked = getattr(error, "wait", None)
                wait = BACK_OFF_SECONDS * 2**fruitless if asked is None else asked
                time.sleep(min(wait, LONGEST_WAIT))
                continue
            found = {k: hasher.hexdigest() for k, hasher in partial.hashers.items()}
            joined, have = partial.joined, partial.have
            try:
                return _accept(partial, target, name, found, bar)
            except DamagedFile:
                # Pieces of two versions, perhaps: once more in one piece before we blame it.
                if not joined or last_try:
                    raise
                bar.update(-have)
                last_try = True


def _attempt(client, url: str, headers: dict, partial: _Partial, name: str, bar) -> None:
    """Send one request and keep what comes; on return the file is complete.

    Raises:
        _Again, httpx.TransportError: worth another attempt.
        DamagedFile: the server offers something else; what has arrived before is kept.
    """
    facts = partial.facts
    if partial.have and partial.have == (facts.size or partial.size):
        return  # the last run ended between the last byte and the new name
    ask = headers | {"Accept-Encoding": "identity"}
    if partial.have:
        ask["Range"] = f"bytes={partial.have}-"
        ask |= {"If-Range": partial.etag} if partial.etag else {}
    with client.stream("GET", url, headers=ask) as response:
        status, etag = response.status_code, _validator(response)
        total = _total(response, url)
        if status == 416 and total == partial.have:
            return
        span = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        other_part = status == 206 and (not span or int(span[1]) != partial.have)
        other_version = status == 206 and (
            (etag and partial.etag and etag != partial.etag)
            or (total and partial.size and total != partial.size)
        )
        if status == 416 or other_part or other_version:
            bar.update(-partial.restart())
            raise _Again("the server sent another part than the one asked for")
        chunks = response.iter_raw()
        first = next(chunks, b"")
        if status == 200:
            cause = digest.diagnose_head(first, name)
            if not cause and facts.size and total is not None and total != facts.size:
                cause = f"The server has {total:,} bytes; {facts.size:,} are published."
            if cause:
                raise _refused(name, url, cause)
        if status == 200 or not partial.have:
            bar.update(-partial.restart())
        _require_room(partial.path.parent, (total or 0) - partial.have)
        partial.joined = partial.have > 0
        partial.etag, partial.size = etag, total
        partial.write_note()
        with open(partial.path, "ab", buffering=0) as file:
            for block in itertools.chain([first], chunks):
                partial.write(file, block)
                bar.update(len(block))
    if total is not None and partial.have != total:
        if partial.have > total:
            bar.update(-partial.restart())
        raise _Again("the connection was cut")


def _total(response: httpx.Response, url: str) -> int | None:
    """Return the size of the whole file by the answer's headers, or raise what the status means."""
    status = response.status_code
    if status in (404, 410):
        raise _NotHere()
    if status in (401, 403):
        raise _NotHere(
            DownloadFailed(
                f"{_shown(url)} was refused ({status}).",
                "The server wants to know who you are, or has no such file.",
                "Set HF_TOKEN for a repository you have access to, or check the address.",
            )
        )
    if status in (408, 425, 429) or status >= 500:
        raise _Again(f"the server answered {status}", _retry_after(response))
    if status not in (200, 206, 416):
        raise DownloadFailed(f"{_shown(url)} was answered with status {status}.")
    header = "Content-Length" if status == 200 else "Content-Range"
    size = response.headers.get(header, "").rpartition("/")[2]
    return int(size) if size.isdecimal() else None


def _validator(response: httpx.Response) -> str | None:
    """Return what names this version of the file; a weak ETag does not (RFC 9110, 13.1.5)."""
    etag = response.headers.get("ETag")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that the server asks to wait; the header is a number or a date."""
    text = response.headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def _accept(partial: _Partial, target: Path, name: str, found: dict | None, bar) -> None:
    """Give a complete file its final name if its bytes are right; else remove it."""
    try:
        row = digest.judge(partial.path, name, partial.facts, bar.update, found)
        if row.status == "WRONG":
            raise _refused(name, partial.url, row.cause, row)
        if name.endswith("checklist.chk"):
            digest.read_checklist(partial.path)
    except DamagedFile:
        partial.restart()
        raise
    with open(partial.path, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial.path, target)
    partial.restart()


def _refused(name: str, source: str, cause: str, row: digest.Row | None = None) -> DamagedFile:
    if row and row.expected:
        # One of the digests says enough here; 'verify' shows them all.
        expected, found = row.expected.split(", ")[0], row.found.split(", ")[0]
        cause = f"{cause} Expected {expected}; found {found}."
    return DamagedFile(
        f"'{name}' from {_shown(source)} is not the published file, and was not kept.",
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


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _require_room(directory: Path, needed: int) -> None:
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise NotEnoughRoom(
            f"{needed / 1e9:.1f} GB are needed at '{directory}', and {free / 1e9:.1f} GB are free.",
            "",
            "Make room, or choose another directory with --models-dir.",
        )
