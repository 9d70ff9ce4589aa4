"""Files: locks, whole-or-nothing writes, room on the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import NotEnoughRoom
from .progress import say


def write_durably(path: Path, content: bytes) -> None:
    """Write a small file so that after a crash it holds the old content or the new."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise NotEnoughRoom(
            f"The disk is full at '{path}'.",
            "What has arrived is kept.",
            "Make room and run this again; it goes on from there.",
        ) from None


def lock_now(file) -> bool:
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


def write_text(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all, in UTF-8.

    Halves of characters, which UTF-8 has no bytes for, become escapes, as JSON spells them.
    """
    new = file.with_name(f".{file.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(new, file)
