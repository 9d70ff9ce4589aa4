"""The directory that a model is written to: it appears whole, under its name, or not at all.

The work lies in a sibling `.OUT.partial` until everything is on disk; then one rename makes it
OUT. A run that is cut off leaves a journal there, and the same command goes on at the first
shard that the journal does not name. `llamalab.json` records what OUT was made from.
"""

import contextlib
import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from llamalab import __version__

from ..errors import DamagedFile, LabError, OutOfDate, OutputExists, UsageError
from ..files import full_disk_named, lock_now, sync_directory, write_whole
from .digests import hash_file
from .layouts import RECORD, open_checkpoint

JOURNAL = "finished-shards.json"
OF_A_MODEL = re.compile(
    r".*\.(json|safetensors|bin|pth|model|chk|md|jinja|unfinished)|LICENSE.*|\.gitattributes"
)
"""Names of files that a model is made of; in a directory that is to be replaced, others are not."""


@dataclass(frozen=True)
class Made:
    """What a convert or merge, which make a directory, or an export, which makes a file, has made.

    `total_bytes` counts the tensors, or is the file's size. `already` is True when all of it was
    there, whole and from the same inputs, and nothing was written. A directory has a
    `tensor_digest`, a GGUF file a `type`.
    """

    path: Path
    tensors: int
    total_bytes: int
    seconds: float
    already: bool = False
    tensor_digest: str = ""
    type: str = ""

    def as_dict(self) -> dict:
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        kind = f"{self.type}, " if self.type else ""
        what = f"{self.tensors} tensors, {kind}{self.total_bytes / 1e6:,.1f} MB"
        how = "already made" if self.already else f"made in {self.seconds:.1f} s"
        digest = f"\n  tensor digest {self.tensor_digest}" if self.tensor_digest else ""
        return f"{self.path} ({what}; {how}){digest}"


class OutputDirectory:
    """Where a model is being written; use it inside `exclusive`.

    Args:
        path: the directory, absent or empty, or to be replaced.
        sources: the files that the model is made from.
        settings: what else decides the bytes; with the sources' states and the versions it is
            the plan, and only shards of the same plan are kept.

    Raises:
        UsageError: the model would overwrite its sources, or the directory cannot be replaced.
    """

    def __init__(self, path: str | Path, sources: Sequence[Path], settings: dict):
        self.path = Path(path).expanduser().resolve()
        _refuse_bad_place(self.path, sources)
        self.partial = _partial(self.path)
        self.inputs = [state_of(source) for source in dict.fromkeys(sources)]
        self.settings = settings
        self.finished: dict[str, dict[str, str]] = {}
        """Shard -> {tensor name: sha256}, of the shards that are on the disk."""

    def already_made(self, overwrite: bool) -> Made | None:
        """Return what lies there if it was made so, or None if the way is free.

        Raises:
            OutputExists: something else lies there, and is not to be overwritten.
            OutOfDate: it was made so, and is damaged, or an input has changed since.
        """
        out = self.path
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        error, why = OutputExists, "It was not made by llamalab, or is not whole."
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, LabError):
            record = json.loads((out / RECORD).read_text(encoding="utf-8"))
            if record["settings"] != self.settings or len(record["inputs"]) != len(self.inputs):
                why = "It was made from other inputs or with other settings."
            elif changed := self._changed_since(record["inputs"]):
                error, why = OutOfDate, f"{changed} has changed since it was made."
            else:
                error, why = OutOfDate, "A file of it is missing or has changed since it was made."
                if made := self._whole(record):
                    (out / JOURNAL).unlink(missing_ok=True)  # a run was cut off just before that
                    return made
        if overwrite:
            _refuse_to_replace_strangers(out)
            return None
        if error is OutOfDate and (strangers := _strangers(out)):
            error, why = OutputExists, f"{why} It also holds {strangers[0]}, which we did not make."
        raise error(
            f"{out} is not empty, and was left as it is.",
            why,
            "Choose another --output-dir, or add --overwrite to replace it.",
        )

    def _changed_since(self, before: list[dict]) -> str:
        """Return the path of the first input that is another file now, or ""."""
        for entry, old in zip(self.inputs, before, strict=True):
            # Size and times alone only tell that it is the same.
            if _identity(entry) != _identity(old):
                if hash_file(Path(entry["path"]))["sha256"] != old["sha256"]:
                    return entry["path"]
        return ""

    def _whole(self, record: dict) -> Made | None:
        """Return what was made if every file of it is there as it was recorded."""
        made = open_checkpoint(self.path)  # refuses when a shard is missing
        small = {n: hash_file(self.path / n)["sha256"] for n in self.settings["files"]}
        if small != self.settings["files"] or set(made.tensors) != set(record["tensors"]):
            return None
        counts = (len(made.tensors), made.total_bytes, 0.0)
        return Made(self.path, *counts, already=True, tensor_digest=record["tensor_digest"])

    def resume(self) -> None:
        """Take over the finished shards of an earlier run of the same plan; remove all else."""
        journal, plan = self.partial / JOURNAL, self._plan()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            earlier = json.loads(journal.read_text(encoding="utf-8"))
            if plan.items() <= earlier.items():
                for name, hashes in earlier["shards"].items():
                    # A power cut may have shortened a file that had its name already.
                    path = self.partial / name
                    if path.is_file() and path.stat().st_size == earlier["sizes"][name]:
                        self.finished[name] = hashes
        for path in self.partial.iterdir():
            if path.name not in self.finished and path != journal:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def finish_shard(self, name: str, hashes: dict[str, str]) -> None:
        """Note in the journal that the shard `name` is on the disk."""
        self.finished[name] = hashes
        sizes = {name: (self.partial / name).stat().st_size for name in self.finished}
        journal = self._plan() | {"shards": self.finished, "sizes": sizes}
        write_whole(self.partial / JOURNAL, json_bytes(journal))

    def _plan(self) -> dict:
        """Return what must be the same for a finished shard to be kept."""
        identities = [_identity(entry) for entry in self.inputs]
        return {"inputs": identities, "settings": self.settings, "versions": versions_in_use()}

    def put_in_place(self, files: dict[str, bytes], overwrite: bool) -> None:
        """Add the small files, and rename all to the directory's name; an old one goes only then.

        Raises:
            OutputExists: it was filled meanwhile, and was left as it is.
        """
        for name, content in files.items():
            write_whole(self.partial / name, content)
        sync_directory(self.partial)
        aside = _aside(self.path)
        if overwrite and self.path.exists():
            shutil.rmtree(aside, ignore_errors=True)
            self.path.rename(aside)
        try:
            self.partial.rename(self.path)  # over an empty directory at most
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise OutputExists(
                f"{self.path} was filled while this ran, and was left as it is.",
                f"What was made lies in {self.partial}.",
                "Empty it, and run the same command again.",
            ) from None
        (self.path / JOURNAL).unlink(missing_ok=True)  # kept until now, to be resumed to the last
        sync_directory(self.path)
        sync_directory(self.path.parent)
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def exclusive(out: Path) -> Iterator[Path]:
    """Hold and yield the work directory beside `out`; it goes again where nothing is to resume.

    Raises:
        OutputExists: another process holds it, or it is none of ours.
        NotEnoughRoom: the disk filled up meanwhile.
    """
    partial, aside = _partial(out), _aside(out)
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
        is_ours = lock_now(descriptor) and partial.exists()
        if not is_ours or not os.path.samestat(os.fstat(descriptor), partial.stat()):
            raise OutputExists(
                f"Another process is writing {partial.name}.",
                "Two commands were given the same output directory.",
                "Wait for the other one to end, then run this again.",
            )
        if aside.exists() and not out.exists():
            aside.rename(out)  # an earlier run was cut off between two renames
        elif aside.exists() and (out / RECORD).is_file():
            shutil.rmtree(aside)  # or after both of them
        why = "Something else has filled it since this began."
        try:
            with full_disk_named(partial, why, "Make room, and run the same command again."):
                yield partial
        except DamagedFile:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            if partial.is_dir() and not any(partial.iterdir()):
                partial.rmdir()
    finally:
        os.close(descriptor)


def _partial(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")


def _refuse_bad_place(out: Path, sources: Sequence[Path]) -> None:
    for path in sources:
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


def _strangers(directory: Path) -> list[str]:
    """Return what a directory holds that is no file of a model."""
    names = sorted(path.name for path in directory.iterdir())
    return [n for n in names if not OF_A_MODEL.fullmatch(n) or (directory / n).is_dir()]


def _refuse_to_replace_strangers(out: Path) -> None:
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


def state_of(path: Path) -> dict:
    """Return what tells, without reading it, whether a file is still the same."""
    stat = path.stat()
    # The last two change also where a copying program has set the time back.
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    return {"path": str(path.absolute()), "size": stat.st_size} | times


def _identity(state: dict) -> list:
    return [state.get(key) for key in ("path", "size", "mtime_ns", "ctime_ns", "inode")]


def refuse_changed(state: dict) -> None:
    """Raise DamagedFile if a file is no longer in the state it was in."""
    if _identity(state_of(Path(state["path"]))) != _identity(state):
        raise DamagedFile(
            f"{state['path']} has changed while it was read.",
            "What was made of it would be of two versions, and was removed.",
            "Run the same command again, when the file stays as it is.",
        )


def json_bytes(value: dict) -> bytes:
    """Return `value` as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def versions_in_use() -> dict[str, str]:
    """Return what the bytes of an output could depend on: package -> version."""
    found = {name: version(name) for name in ("torch", "safetensors", "sentencepiece")}
    return {"llamalab": __version__, "python": platform.python_version()} | found
