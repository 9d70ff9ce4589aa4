"""Files: whole-or-nothing writes, locks, and room on the disk."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import NotEnoughRoom
from .progress import say
from .units import size_text


def partial_of(path: Path) -> Path:
    """Return where a download of `path` grows until it is whole; its sidecar adds `.json`."""
    return path.with_name(path.name + ".partial")


def write_whole(path: Path, content: bytes | str) -> None:
    """Write a small file that, whatever happens, holds its old content or the new.

    Text is written in UTF-8. Halves of characters, which UTF-8 has no bytes for, become escapes,
    as JSON spells them.
    """
    content = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk: renames in it then outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_now(file: IO | int) -> bool:
    """Lock an open file until it is closed; return False where another process has done so.

    A file system without locks, as some of clusters are, keeps nobody out.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes from working in `directory`; wait while another one does."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock.partial"
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not lock_now(lock):
                say(f"Another process is at work in '{directory}'; waiting for it.")
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(lock), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:  # else who had it before removed the file, and it keeps nobody out
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(lock)


def disk_free(directory: Path) -> int:
    """Return the bytes free where `directory` is, or will be once it is made."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def require_room(directory: Path, needed: int, why: str = "", fix: str = "") -> int:
    """Return the bytes free at `directory`, which may not exist yet, if they are enough.

    Raises:
        NotEnoughRoom: fewer than `needed` are free.
    """
    free = disk_free(directory)
    if free < needed:
        raise NotEnoughRoom(
            f"{size_text(needed)} are needed at '{directory}', and {size_text(free)} are free.",
            why,
            fix or "Make room, or choose a directory on another disk.",
        )
    return free


@contextlib.contextmanager
def full_disk_named(path: Path, why: str, fix: str) -> Iterator[None]:
    """Turn the system's word for a disk that fills up meanwhile into `NotEnoughRoom`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NotEnoughRoom(f"The disk is full at '{path}'.", why, fix) from None
