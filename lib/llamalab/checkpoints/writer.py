"""Writing: the only place that moves weights, in a way that leaves no half-made model behind.

`write` streams any checkpoint, block by block, into safetensors shards (HF layout) or the
archive that `torch.load` reads (Meta layout): memory holds about one block, never a model. The
work lies in a sibling `.OUT.partial` until everything is on disk; then one rename makes it OUT.
A run that is cut off is taken up again by the same command, at the first unfinished shard.
"""

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ..files import require_room
from ..progress import bytes_bar
from ..units import parse_size
from .checkpoint import Checkpoint, raw_bytes, tensor_digest
from .containers import DirectFile, write_safetensors, write_torch_archive
from .digests import hash_file
from .layouts import RECORD
from .output_directory import (
    Made,
    OutputDirectory,
    exclusive,
    json_bytes,
    refuse_changed,
    versions_in_use,
)

SMALL_FILES = 64 * 2**20
"""Bytes of room for all files of a model but the weights."""


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
    began, shard_size = time.monotonic(), parse_size(max_shard_size)
    shards = plan_shards(checkpoint, shard_size)
    files = files | _configuration(checkpoint)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    settings = {"max_shard_size": shard_size, "files": sums}
    out = OutputDirectory(output_dir, checkpoint.inputs, settings)
    with exclusive(out.path):
        if made := out.already_made(overwrite):
            return made
        out.resume()
        left = [name for shard in shards.keys() - out.finished.keys() for name in shards[shard]]
        require_room(
            out.path.parent,
            sum(checkpoint.tensors[name].nbytes for name in left) + SMALL_FILES,
            "The model is written whole beside its inputs, before anything is replaced.",
            "Make room, or choose an --output-dir on another disk.",
        )
        inputs = _write_shards(checkpoint, shards, out)
        hashes = {name: sha for shard in out.finished.values() for name, sha in shard.items()}
        digest = tensor_digest({n: (s, hashes[n]) for n, s in checkpoint.tensors.items()})
        if len(shards) > 1:
            files["model.safetensors.index.json"] = _index(checkpoint, shards)
        record = {
            "made_by": made_by,
            "made_of": list(checkpoint.made_of),
            "inputs": inputs,
            "settings": settings,
            "versions": versions_in_use(),
            "tensor_digest": digest,
            "tensors": hashes,
        }
        out.put_in_place(files | {RECORD: json_bytes(record)}, overwrite)
    total, seconds = checkpoint.total_bytes, time.monotonic() - began
    return Made(out.path, len(checkpoint.tensors), total, seconds, tensor_digest=digest)


def _configuration(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Return the configuration files of a checkpoint's layout, name -> content."""
    if checkpoint.layout == "meta":
        return {"params.json": json_bytes(checkpoint.config)}
    return {
        "config.json": json_bytes(checkpoint.config),
        "generation_config.json": json_bytes({"bos_token_id": 1, "eos_token_id": 2}),
    }


def _index(checkpoint: Checkpoint, shards: dict[str, list[str]]) -> bytes:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    total = {"total_size": checkpoint.total_bytes}
    return json_bytes({"metadata": total, "weight_map": weight_map})


def _write_shards(
    checkpoint: Checkpoint, shards: dict[str, list[str]], out: OutputDirectory
) -> list[dict]:
    """Write the shards that are not finished; return the inputs' states, each with its sha256."""
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
            paths = [Path(state["path"]) for state in out.inputs]
            sums = [pool.submit(hash_file, path, on_bytes=go_on) for path in paths]
            for shard, names in shards.items():
                if shard in out.finished:
                    bar.update(sum(checkpoint.tensors[name].nbytes for name in names))
                    continue
                path = out.partial / shard
                hashes = _write_shard(checkpoint, names, path, hashing, bar.update)
                out.finish_shard(shard, hashes)
            digests = [result.result() for result in sums]
            for state in out.inputs:
                refuse_changed(state)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [state | digest for state, digest in zip(out.inputs, digests, strict=True)]


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
