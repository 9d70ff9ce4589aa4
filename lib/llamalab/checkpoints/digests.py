"""Digests: is a file, byte for byte, the one that was published? If not, what is it?

A digest is a short number computed from every byte of a file. Two are in use here: md5, which
Meta's `checklist.chk` holds, and sha256, which nobody can forge on purpose.
"""

import hashlib
import json
import os
import re
import struct
import time
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from ..catalog import FileFacts
from ..errors import DamagedFile
from ..files import partial_of
from ..reports import Row

BLOCK = 1 << 20  # bytes a read: large enough that hashlib works outside the interpreter lock
HEAD = 1024  # bytes that tell what a file is
DAMAGED = "Size and first bytes look right, so bytes changed on the way or on the disk."


class Digests:
    """Several digests of one stream of bytes; large blocks keep a thread for each of them busy.

    `algorithms` are names that `hashlib.new` knows.
    """

    def __init__(self, algorithms: Iterable[str]):
        self._hashers = {name: hashlib.new(name) for name in algorithms}
        self._others = list(self._hashers.values())[1:]
        self._pool = ThreadPoolExecutor(len(self._others)) if self._others else None

    def update(self, block) -> None:
        large = len(block) > BLOCK // 16  # else handing it over takes longer than the sum
        pending = [self._pool.submit(h.update, block) for h in self._others] if large else []
        for hasher in list(self._hashers.values())[: 1 if large else None]:
            hasher.update(block)
        for future in pending:
            future.result()

    def hexdigests(self) -> dict[str, str]:
        """Return {algorithm: hexadecimal digest} of all the blocks so far."""
        return {name: hasher.hexdigest() for name, hasher in self._hashers.items()}


def hash_file(
    path: str | os.PathLike,
    algorithms: Iterable[str] = ("sha256",),
    on_bytes: Callable[[int], object] | None = None,
    on_read: Callable[[float], object] | None = None,
) -> dict[str, str]:
    """Return {algorithm: hexadecimal digest} of a file, read once, 1 MiB at a time.

    `on_bytes(count)` is called for each block, `on_read(seconds)` with what reading it took.
    """
    digests = Digests(algorithms)
    block = memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            # Read far ahead, in large pages: a tenth of the processor's time (measured).
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while True:
            start = time.perf_counter()
            count = file.readinto(block)
            seconds = time.perf_counter() - start
            if not count:
                return digests.hexdigests()
            digests.update(block[:count])
            if on_bytes:
                on_bytes(count)
            if on_read:
                on_read(seconds)


def is_safe_relative(name: str) -> bool:
    """Whether `name`, a path with `/` from a list or a server, stays inside its directory."""
    rubbish = not name or any(c in name for c in "\\:\0\n\r") or name.startswith("/")
    return not rubbish and ".." not in name.split("/") and PurePosixPath(name).name != ""


def read_checklist(path: str | os.PathLike) -> dict[str, str]:
    """Return {name: md5} of a file in md5sum's format, the names relative to its directory.

    A line is `<32 hexadecimal digits>  <name>`, or ` *<name>` where md5sum read in binary mode.
    Blank lines and lines that begin with `#` are passed over, as md5sum does.

    Raises:
        DamagedFile: another line, a name outside the directory, one name with two digests, or
            not one digest in it.
    """
    path, digests = Path(path), {}
    if path.stat().st_size > 1 << 20:  # Meta's have a few hundred bytes
        raise DamagedFile(f"'{path.name}' is too large for a checklist.", "", "Fetch it again.")
    text = path.read_bytes().decode("utf-8", "replace")
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-fA-F]{32}) [ *](.+)", line)
        md5, name = (match[1].lower(), match[2]) if match else ("", "")
        if not is_safe_relative(name):
            why = f"Line {number} names a file outside the directory."
            if not match:
                why = diagnose_bytes(path) or f"Line {number} is not '<md5>  <name>'."
            raise DamagedFile(f"'{path.name}' is not a checklist.", why, "Fetch it again.")
        if digests.setdefault(name, md5) != md5:
            raise DamagedFile(f"'{path.name}' gives '{name}' two digests.", "", "Fetch it again.")
    if not digests:
        raise DamagedFile(f"'{path.name}' holds no digest.", "", "Fetch it again.")
    return digests


def diagnose_head(head: bytes, name: str) -> str | None:
    """Return what stands in for the file `name`, told from its first bytes, or None."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "An HTML page, not the file: the server sent a login, licence or error page."
    if start.startswith(b"version https://git-lfs"):
        return "A Git LFS pointer, the placeholder that git leaves where git-lfs is not installed."
    if start.startswith(b'{"') and not name.endswith(".json"):
        return "A JSON message, most likely a server's error, not the file."
    if head.startswith(b"\x1f\x8b"):
        return "A gzip archive: the server or a tool compressed the file."
    return None


def diagnose_bytes(path: str | os.PathLike, facts: FileFacts | None = None) -> str | None:
    """Return the likely cause of wrong bytes in one sentence, from size and first bytes, or None.

    Only a few bytes are read, at the two ends, whatever the size of the file.
    """
    path, wanted = Path(path), facts.size if facts else None
    size = path.stat().st_size
    if size == 0:
        return "The file is empty."
    with open(path, "rb") as file:
        head = file.read(HEAD)
    name = path.stem if path == partial_of(path.with_suffix("")) else path.name
    if cause := diagnose_head(head, name):
        return cause
    if wanted is not None and size < wanted:
        return f"The file is cut off: {size:,} of {wanted:,} bytes are there."
    if wanted is not None and size > wanted:
        return f"The file is {size - wanted:,} bytes too long: another version, or two in one."
    return _diagnose_container(path, name, head, size)


def _diagnose_container(path: Path, name: str, head: bytes, size: int) -> str | None:
    """Return what is wrong with a file of the kind that its name promises, or None."""
    if name.endswith((".pth", ".bin", ".pt")):
        if head.startswith(b"\x80"):
            return "A bare pickle, as PyTorch wrote before 1.6; newer files are zip archives."
        if not head.startswith(b"PK\x03\x04"):
            return "Not a PyTorch file: those begin as zip archives do, with the letters PK."
        if not zipfile.is_zipfile(path):
            return "The file is cut off: the directory at the end of a zip archive is missing."
    if name.endswith(".json"):
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return "Not JSON, or only the beginning of it."
    if name.endswith(".safetensors") and (size < 8 or size < 8 + struct.unpack("<Q", head[:8])[0]):
        return "The file is cut off inside the header of a safetensors file."
    return None


def compare_file(
    path: Path,
    name: str,
    facts: FileFacts,
    on_bytes: Callable[[int], object] | None = None,
    found: dict[str, str] | None = None,
    *,
    on_read: Callable[[float], object] | None = None,
) -> Row:
    """Compare one file with what is published of it: the size first, then every known digest.

    The row's status is OK, WRONG, MISSING or UNKNOWN (nothing is published).

    `found` are digests of the file that are known already; else the file is read.
    """
    if not path.is_file():
        here = bytes_arrived(path)
        cause = f"{here:,} bytes have arrived; the same download goes on from there."
        return Row("MISSING", name, cause=cause if here else "")
    size = path.stat().st_size
    if facts.size is not None and size != facts.size:
        cause = diagnose_bytes(path, facts) or ""
        return Row("WRONG", name, f"{size:,} bytes", f"{facts.size:,} bytes", cause)
    expected = {k: v.lower() for k in ("md5", "sha256") if (v := getattr(facts, k))}
    if not expected:
        cause = diagnose_bytes(path, facts)
        return Row("WRONG" if cause else "UNKNOWN", name, f"{size:,} bytes", cause=cause or "")
    if not found or not found.keys() >= expected.keys():
        found = hash_file(path, expected, on_bytes, on_read)
    found = {algorithm: found[algorithm] for algorithm in expected}
    texts = [", ".join(f"{k} {v}" for k, v in digests.items()) for digests in (found, expected)]
    if found == expected:
        return Row("OK", name, *texts)
    return Row("WRONG", name, *texts, diagnose_bytes(path, facts) or DAMAGED)


def bytes_arrived(path: Path) -> int:
    """Return the bytes on the disk of the unfinished download of `path`; it may have holes."""
    partial = partial_of(path)
    status = partial.stat() if partial.is_file() else None
    return min(status.st_size, status.st_blocks * 512) if status else 0


def checklist_facts(directory: Path) -> tuple[dict[str, FileFacts], list[Row]]:
    """Return what the checklists under `directory` say of its files, and a row for each bad one."""
    facts, bad = {}, []
    for path in sorted(directory.rglob("*checklist.chk")):
        folder = path.parent.relative_to(directory)
        try:
            digests = read_checklist(path)
        except DamagedFile as error:
            bad.append(Row("WRONG", (folder / path.name).as_posix(), cause=error.why or error.what))
        else:
            facts |= {(folder / n).as_posix(): FileFacts(md5=md5) for n, md5 in digests.items()}
    return facts, bad
