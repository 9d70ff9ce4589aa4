"""The directory that a model is written to: locked, resumed, replaced and recorded."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from llamalab import __version__

from ..errors import DamagedFile, LabError, NotEnoughRoom, OutOfDate, OutputExists, UsageError
from ..files import sync_directory
from .checkpoint import Checkpoint
from .digests import hash_file
from .layouts import open_checkpoint

RECORD = "llamalab.json"
"""The record in every directory we make: inputs and digests, settings, versions, digest."""


@dataclass(frozen=True)
class Made:
    """What a convert or merge has made.

    `total_bytes` counts the tensors; `already` is True when the directory was whole from the
    same inputs and nothing was written.
    """

    path: Path
    tensor_digest: str
    tensors: int
    total_bytes: int
    seconds: float
    already: bool = False

    def as_dict(self) -> dict:
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        what = f"{self.tensors} tensors, {self.total_bytes / 1e6:,.1f} MB"
        how = "already made" if self.already else f"made in {self.seconds:.1f} s"
        return f"{self.path} ({what}; {how})\n  tensor digest {self.tensor_digest}"


def refuse_bad_place(out: Path, inputs: list[Path]) -> None:
    for path in inputs:
        # Where it is named as well as where it lies: a base may be a directory of links.
        for place in (path.resolve(), path.parent.resolve() / path.name):
            if place.is_relative_to(out):
                raise UsageError(
                    f"The output directory {out} holds an input: {path}.",
                    "Writing there could destroy what is being read.",
                    "Choose another --output-dir.",
                )
    if out.is_mount():
        raise UsageError(
            f"{out} is a file system of its own.",
            "A finished model is put in its place by renaming, which cannot replace that.",
            f"Give a directory inside it, as {out / 'model'}.",
        )


_OF_A_MODEL = re.compile(
    r".*\.(json|safetensors|bin|pth|model|chk|md|jinja|unfinished)|LICENSE.*|\.gitattributes"
)


def _strangers(directory: Path) -> list[str]:
    """Return what a directory holds that is no file of a model."""
    names = sorted(path.name for path in directory.iterdir())
    return [n for n in names if not _OF_A_MODEL.fullmatch(n) or (directory / n).is_dir()]


def refuse_to_replace_strangers(out: Path) -> None:
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = None
    is_model = (out / RECORD).is_file() or (isinstance(config, dict) and "model_type" in config)
    strangers = _strangers(out) if is_model else []
    if not is_model or strangers:
        raise OutputExists(
            f"{out} is not a model, and was left as it is."
            if not is_model
            else f"{out} holds {strangers[0]}, which is no part of a model, and was left as it is.",
            "--overwrite replaces a model by a model, and nothing else.",
            "Choose another --output-dir, or remove what is there yourself.",
        )


JOURNAL = "finished-shards.json"


def refuse_changed(entry: dict) -> None:
    if identity_of(state_of(Path(entry["path"]))) != identity_of(entry):
        raise DamagedFile(
            f"{entry['path']} has changed while it was read.",
            "What was made of it would be of two versions, and was removed.",
            "Run the same command again, when the file stays as it is.",
        )


def already_made(out: Path, inputs: list[dict], settings: dict) -> Made:
    """Return what lies in `out` if it is whole and from the same inputs and settings.

    Raises:
        OutputExists: it is something else.
        OutOfDate: it was made so, and is damaged, or an input has changed since.
    """
    error, why = OutputExists, "It was not made by llamalab, or is not whole."
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, LabError):
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        before = record["inputs"]
        if record["settings"] != settings or len(before) != len(inputs):
            why = "It was made from other inputs or with other settings."
        elif changed := [i["path"] for i, o in zip(inputs, before, strict=True) if _differs(i, o)]:
            error, why = OutOfDate, f"{changed[0]} has changed since it was made."
        else:
            error, why = OutOfDate, "A file of it is missing or has changed since it was made."
            made = open_checkpoint(out)  # refuses when a shard is missing
            small = {name: hash_file(out / name)["sha256"] for name in settings["files"]}
            if small == settings["files"] and set(made.tensors) == set(record["tensors"]):
                digest, count = record["tensor_digest"], len(made.tensors)
                (out / JOURNAL).unlink(missing_ok=True)  # a run was cut off just before that
                return Made(out, digest, count, made.total_bytes, 0.0, already=True)
    if error is OutOfDate and (strangers := _strangers(out)):
        error, why = OutputExists, f"{why} It also holds {strangers[0]}, which we did not make."
    raise error(
        f"{out} is not empty, and was left as it is.",
        why,
        "Choose another --output-dir, or add --overwrite to replace it.",
    )


def _differs(entry: dict, old: dict) -> bool:
    """Whether an input is another file now; size and time alone only tell that it is the same."""
    return (
        identity_of(entry) != identity_of(old)
        and hash_file(Path(entry["path"]))["sha256"] != old["sha256"]
    )


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[Path]:
    """Hold and yield the work directory beside `out`; it goes again where nothing is to resume."""
    partial, aside = out.with_name(f".{out.name}.partial"), _aside(out)
    partial.mkdir(parents=True, exist_ok=True)
    if partial.is_symlink() or (strangers := _strangers(partial)):
        raise OutputExists(
            f"{partial} is a link."
            if partial.is_symlink()
            else f"{partial} holds {strangers[0]}, which we did not make.",
            "Work under way lies there, and what is there already would be lost.",
            "Move it away, or choose another --output-dir.",
        )
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise OutputExists(
                f"Another process is writing {partial.name}.",
                "Two commands were given the same output directory.",
                "Wait for the other one to end, then run this again.",
            )
        if aside.exists() and not out.exists():
            aside.rename(out)  # an earlier run was cut off between two renames
        elif aside.exists() and (out / RECORD).is_file():
            shutil.rmtree(aside)  # or after both of them
        try:
            yield partial
        except DamagedFile:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise NotEnoughRoom(
                f"The disk is full at {partial}.",
                "Something else has filled it since this began.",
                "Make room, and run the same command again.",
            ) from None
        finally:
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
    finally:
        os.close(descriptor)


def resume_shards(partial: Path, inputs: list[dict], settings: dict) -> dict[str, dict[str, str]]:
    """Return the finished shards of an earlier run of the same plan; remove anything else."""
    journal, plan = partial / JOURNAL, plan_of(inputs, settings)
    done: dict = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        held = json.loads(journal.read_text(encoding="utf-8"))
        if plan.items() <= held.items():
            for name, sums in held["shards"].items():
                # A power cut may have shortened a file that had its name already.
                path = partial / name
                if path.is_file() and path.stat().st_size == held["sizes"][name]:
                    done[name] = sums
    for path in partial.iterdir():
        if path.name not in done and path != journal:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return done


def require_room_for_shards(checkpoint: Checkpoint, shards: dict, done: dict, partial: Path) -> None:
    left = sum(
        checkpoint.tensors[name].nbytes
        for shard, names in shards.items()
        for name in names
        if shard not in done
    )
    needed, free = left + 64 * 2**20, shutil.disk_usage(partial).free
    if free < needed:
        raise NotEnoughRoom(
            f"{needed / 1e9:.1f} GB are needed at {partial.parent}, and {free / 1e9:.1f} GB are free.",
            "The model is written whole beside its inputs, before anything is replaced.",
            "Make room, or choose an --output-dir on another disk.",
        )


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def put_in_place(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename the finished work directory to `out`, durably; an old `out` goes only then."""
    sync_directory(partial)
    aside = _aside(out)
    if overwrite and out.exists():
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    try:
        partial.rename(out)  # over an empty directory at most
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise OutputExists(
            f"{out} was filled while this ran, and was left as it is.",
            f"What was made lies in {partial}.",
            "Empty it, and run the same command again.",
        ) from None
    (out / JOURNAL).unlink(missing_ok=True)  # kept until now, to be resumed to the last
    sync_directory(out)
    sync_directory(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def state_of(path: Path) -> dict:
    stat = path.stat()
    # The last two change also where a copying program has set the time back.
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    return {"path": str(path.absolute()), "size": stat.st_size} | times


def identity_of(entry: dict) -> list:
    return [entry.get(k) for k in ("path", "size", "mtime_ns", "ctime_ns", "inode")]


def json_bytes(value: dict) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def versions_in_use() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "safetensors", "sentencepiece")}
    return {"llamalab": __version__, "python": platform.python_version()} | found


def plan_of(inputs: list[dict], settings: dict) -> dict:
    """Return what must be the same for a finished shard to be kept: the versions are part of it."""
    keys = [identity_of(entry) for entry in inputs]
    return {"inputs": keys, "settings": settings, "versions": versions_in_use()}
