"""Writing: the only place that moves weights, in a way that leaves no half-made model behind.

`write` streams any checkpoint, block by block, into safetensors shards (HF layout) or the
archive that `torch.load` reads (Meta layout): memory holds about one block, never a model. The
work lies in a sibling `.OUT.partial` until everything is on disk; then one rename makes it OUT.
A run that is cut off is taken up again by the same command, at the first unfinished shard.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from . import __version__
from .checkpoint import Checkpoint, open_checkpoint, raw_bytes, tensor_digest
from .containers import DirectFile, write_safetensors, write_torch_archive
from .digest import hash_file
from .errors import (
    DamagedFile,
    LabError,
    NotEnoughRoom,
    OutOfDate,
    OutputExists,
    UsageError,
)
from .progress import bytes_bar

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


def parse_size(text: str | int) -> int:
    """Return bytes for "2GB", "500MB", "1GiB" or a number.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    units = {"": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B)?\s*", str(text), re.IGNORECASE)
    size = int(float(match[1]) * units[(match[2] or "").upper()]) if match else 0
    if size <= 0:
        raise UsageError(f"'{text}' is not a size.", "", "Write it as 2GB, 500MB or 1GiB.")
    return size


def plan_shards(checkpoint: Checkpoint, max_shard_size: int) -> dict[str, list[str]]:
    """Return shard file name -> tensor names, layer by layer, the same by every route.

    A shard is closed before it would pass `max_shard_size` bytes; a tensor larger than that
    has a shard of its own. One shard alone is called `model.safetensors`. Meta layout has one
    `consolidated.00.pth`, whatever its size.
    """
    # By name, numbers by value: layer 2 before layer 10, whatever the input's order was.
    ordered = sorted(
        checkpoint.tensors,
        key=lambda name: [
            (len(part), part) if part.isdigit() else (0, part) for part in name.split(".")
        ],
    )
    if checkpoint.layout == "meta":
        return {"consolidated.00.pth": ordered}
    groups: list[list[str]] = [[]]
    filled = 0
    for name in ordered:
        spec = checkpoint.tensors[name]
        if groups[-1] and filled + spec.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += spec.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {
        f"model-{i:05d}-of-{len(groups):05d}.safetensors": group
        for i, group in enumerate(groups, start=1)
    }


def write(
    checkpoint: Checkpoint,
    output_dir: str | Path,
    *,
    files: dict[str, bytes],
    made_by: str,
    max_shard_size: str | int = "2GB",
    overwrite: bool = False,
) -> Made:
    """Write `checkpoint` in its layout, with its configuration and `files`, to `output_dir`.

    Args:
        files: further small files, name -> content; the tokenizer's.
        made_by: the verb, for the record.
        max_shard_size: bytes, or text such as "2GB".
        overwrite: replace another model in the output directory; never anything else.

    Raises:
        OutputExists, OutOfDate, UsageError, NotEnoughRoom: before anything is written.
        DamagedFile: an input turned out bad on the way; the output directory is as it was.
    """
    out, began = Path(output_dir).expanduser().resolve(), time.monotonic()
    _refuse_bad_place(out, checkpoint.inputs)
    if checkpoint.layout == "meta":
        files = files | {"params.json": _json(checkpoint.config)}
    else:
        generation = {"bos_token_id": 1, "eos_token_id": 2}
        files = files | {
            "config.json": _json(checkpoint.config),
            "generation_config.json": _json(generation),
        }
    shards = plan_shards(checkpoint, parse_size(max_shard_size))
    settings = {
        "max_shard_size": parse_size(max_shard_size),
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    inputs = [state_of(path) for path in dict.fromkeys(checkpoint.inputs)]
    with exclusive(out) as partial:
        if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
            try:
                return _already_made(out, inputs, settings)
            except OutputExists:
                if not overwrite:
                    raise
                _refuse_to_replace_strangers(out)
        done = _resume(partial, inputs, settings)
        _require_room(checkpoint, shards, done, partial)
        hashes = _write_shards(checkpoint, shards, partial, done, inputs, settings)
        digest = tensor_digest({n: (s, hashes[n]) for n, s in checkpoint.tensors.items()})
        if len(shards) > 1:
            index = {name: shard for shard, names in shards.items() for name in names}
            files["model.safetensors.index.json"] = _json(
                {"metadata": {"total_size": checkpoint.total_bytes}, "weight_map": index}
            )
        record = {
            "made_by": made_by,
            "made_of": list(checkpoint.made_of),
            "inputs": inputs,
            "settings": settings,
            "versions": _versions(),
            "tensor_digest": digest,
            "tensors": hashes,
        }
        for name, content in (files | {RECORD: _json(record)}).items():
            _write_durably(partial / name, content)
        _put_in_place(partial, out, overwrite)
    total, seconds = checkpoint.total_bytes, time.monotonic() - began
    return Made(out, digest, len(checkpoint.tensors), total, seconds)


def _refuse_bad_place(out: Path, inputs: list[Path]) -> None:
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


_JOURNAL = "finished-shards.json"


def _write_shards(
    checkpoint: Checkpoint,
    shards: dict[str, list[str]],
    partial: Path,
    done: dict[str, dict[str, str]],
    inputs: list[dict],
    settings: dict,
) -> dict[str, str]:
    """Write the shards that are not in `done`, and add each input's sha256 to its entry.

    Returns tensor name -> sha256, those of the shards done before included.
    """
    hashes = {name: sha for shard in done.values() for name, sha in shard.items()}
    stop = threading.Event()

    def go_on(_: int) -> None:
        if stop.is_set():
            raise InterruptedError

    with (
        one_thread(),
        ThreadPoolExecutor(1) as pool,
        ThreadPoolExecutor(1) as hashing,
        bytes_bar(checkpoint.total_bytes, "writing") as bar,
    ):
        try:
            # The inputs are hashed beside the writing, while their pages are in the cache.
            sums = [pool.submit(hash_file, Path(e["path"]), on_bytes=go_on) for e in inputs]
            for shard, names in shards.items():
                if shard in done:
                    bar.update(sum(checkpoint.tensors[name].nbytes for name in names))
                    continue
                done[shard] = _write_shard(checkpoint, names, partial / shard, hashing, bar.update)
                hashes |= done[shard]
                sizes = {name: (partial / name).stat().st_size for name in done}
                journal = _plan(inputs, settings) | {"shards": done, "sizes": sizes}
                _write_durably(partial / _JOURNAL, _json(journal))
            for entry, result in zip(inputs, sums, strict=True):
                entry["sha256"] = result.result()["sha256"]
                refuse_changed(entry)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return hashes


def refuse_changed(entry: dict) -> None:
    if _key(state_of(Path(entry["path"]))) != _key(entry):
        raise DamagedFile(
            f"{entry['path']} has changed while it was read.",
            "What was made of it would be of two versions, and was removed.",
            "Run the same command again, when the file stays as it is.",
        )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread of PyTorch's: the sums beside it need the other cores.

    Its blocks are too small to be shared anyway, and threads that wait for each other on busy
    cores took three times the processor's time of one (measured).
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(
    checkpoint: Checkpoint,
    names: list[str],
    path: Path,
    hashing: ThreadPoolExecutor,
    on_bytes: Callable[[int], object],
) -> dict[str, str]:
    """Stream the named tensors into one file; return tensor name -> sha256."""
    hashes = {}

    def content(name: str) -> Iterator[memoryview]:
        sha256, under_way = hashlib.sha256(), None
        for block in checkpoint.blocks(name):
            data = raw_bytes(block)
            if under_way:
                under_way.result()
            under_way = hashing.submit(sha256.update, data)  # while the next block is computed
            yield data
            on_bytes(len(data))
        if under_way:
            under_way.result()
        hashes[name] = sha256.hexdigest()

    specs = {name: checkpoint.tensors[name] for name in names}
    unfinished = path.with_suffix(".unfinished")
    try:
        with DirectFile(unfinished) as file:
            if path.suffix == ".pth":
                write_torch_archive(file, path.stem, specs, content)
            else:
                write_safetensors(file, specs, content)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    os.replace(unfinished, path)
    return hashes


def _already_made(out: Path, inputs: list[dict], settings: dict) -> Made:
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
                (out / _JOURNAL).unlink(missing_ok=True)  # a run was cut off just before that
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
    return _key(entry) != _key(old) and hash_file(Path(entry["path"]))["sha256"] != old["sha256"]


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


def _resume(partial: Path, inputs: list[dict], settings: dict) -> dict[str, dict[str, str]]:
    """Return the finished shards of an earlier run of the same plan; remove anything else."""
    journal, plan = partial / _JOURNAL, _plan(inputs, settings)
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


def _plan(inputs: list[dict], settings: dict) -> dict:
    """Return what must be the same for a finished shard to be kept: the versions are part of it."""
    keys = [_key(entry) for entry in inputs]
    return {"inputs": keys, "settings": settings, "versions": _versions()}


def _require_room(checkpoint: Checkpoint, shards: dict, done: dict, partial: Path) -> None:
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


def _put_in_place(partial: Path, out: Path, overwrite: bool) -> None:
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
    (out / _JOURNAL).unlink(missing_ok=True)  # kept until now, to be resumed to the last
    sync_directory(out)
    sync_directory(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _write_durably(path: Path, content: bytes) -> None:
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


def state_of(path: Path) -> dict:
    stat = path.stat()
    # The last two change also where a copying program has set the time back.
    times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}
    return {"path": str(path.absolute()), "size": stat.st_size} | times


def _key(entry: dict) -> list:
    return [entry.get(k) for k in ("path", "size", "mtime_ns", "ctime_ns", "inode")]


def _json(value: dict) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "safetensors", "sentencepiece")}
    return {"llamalab": __version__, "python": platform.python_version()} | found
