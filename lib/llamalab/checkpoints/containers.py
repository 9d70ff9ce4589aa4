"""The two containers that weights lie in, written one block at a time.

A model is larger than memory, so neither `safetensors.save_file` nor `torch.save`, which take all
of it at once, will do. Formats: the safetensors documentation, section "Format"; for the archive,
PyTorch's notes on serialization ("Serialized file format for torch.save").
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import math
import mmap
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from .checkpoint import SAFETENSORS_NAMES, TensorSpec

Content = Callable[[str], Iterator[memoryview]]
"""Gives the bytes of a tensor by name, block by block."""

_PIECE = 16 * 2**20
"""Bytes that are handed to the disk at once."""
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


class DirectFile:
    """A new file, written past the page cache, on its way to the disk while the next bytes come.

    The page cache would hold a second copy of every byte, at the cost of most of the time and of
    the pages of the inputs. Where a file system does not offer that, the file is an ordinary
    one. What direct writing asks for, whole blocks from aligned memory, is met by two buffers:
    one is filled while the other is written.

    Use it as a context manager; on leaving it without an error all bytes are on the disk.

    Raises:
        OSError: from `write` or on leaving, also for bytes given earlier.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o666)
        # Anonymous maps begin on a page, as direct writing needs it.
        self._filling, self._other = (
            numpy.frombuffer(mmap.mmap(-1, _PIECE), dtype=numpy.uint8) for _ in range(2)
        )
        self._filled = self._length = 0
        self._pool = ThreadPoolExecutor(1)
        self._under_way: Future | None = None

    def tell(self) -> int:
        return self._length

    def flush(self) -> None:
        """Do nothing: bytes go to the disk as they come, and are there on leaving."""

    def write(self, data) -> int:
        rest = numpy.frombuffer(data, dtype=numpy.uint8) if len(data) else data
        while len(rest):
            count = min(len(rest), _PIECE - self._filled)
            self._filling[self._filled : self._filled + count] = rest[:count]
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == _PIECE:
                self._send()
        self._length += len(data)
        return len(data)

    def _send(self) -> None:
        """Hand the buffer over to be written, once the one before it is."""
        if self._under_way:
            self._under_way.result()
        full = self._filling[: self._filled]
        self._under_way = self._pool.submit(self._write_all, memoryview(full))
        self._filling, self._other, self._filled = self._other, self._filling, 0

    def _write_all(self, data: memoryview) -> None:
        if len(data) % mmap.PAGESIZE:  # the end of the file, which is no whole block
            self._be_ordinary()
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._be_ordinary():
                    raise

    def _be_ordinary(self) -> bool:
        """Write through the page cache from now on; return whether that is a change."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            if kind is None:
                self._send()
                self._under_way.result()
                os.fsync(self._descriptor)
        finally:
            self._pool.shutdown()
            os.close(self._descriptor)


def write_safetensors(file: BinaryIO, specs: dict[str, TensorSpec], content: Content) -> None:
    """Write the safetensors format: u64 length of the header, the header, the bytes."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns the first tensor to 8 bytes
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in specs:
        for data in content(name):
            file.write(data)


@dataclass(frozen=True)
class _Stored:
    """Stands for a tensor (or, as a persistent id, for its storage) in the archive's pickle."""

    key: str
    spec: TensorSpec


class _TensorPickler(pickle.Pickler):
    """Writes the `data.pkl` that `torch.save` would, with the bytes left to be streamed after."""

    def persistent_id(self, item):
        if not isinstance(item, _Storage):
            return None
        name = {torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float"}
        storage_type = getattr(torch, f"{name[item.spec.dtype]}Storage")
        return ("storage", storage_type, item.key, "cpu", math.prod(item.spec.shape))

    def reducer_override(self, item):
        if type(item) is not _Stored:
            return NotImplemented
        strides = [math.prod(item.spec.shape[i + 1 :]) for i in range(len(item.spec.shape))]
        storage = _Storage(item.key, item.spec)
        arguments = (storage, 0, item.spec.shape, tuple(strides), False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Storage(_Stored):
    pass


def write_torch_archive(
    file: BinaryIO, stem: str, specs: dict[str, TensorSpec], content: Content
) -> None:
    """Write the zip archive that `torch.load` reads, one tensor at a time.

    `torch.save` would need the whole model in memory. Each tensor has a storage of its own,
    aligned to 64 bytes as PyTorch does, so that the file can be mapped.
    """
    pickled = io.BytesIO()
    stored = {name: _Stored(str(i), spec) for i, (name, spec) in enumerate(specs.items())}
    _TensorPickler(pickled, protocol=2).dump(stored)
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickled.getvalue()), ("byteorder", b"little")):
            archive.writestr(zipfile.ZipInfo(f"{stem}/{name}"), data)
        for name, entry in stored.items():
            info = zipfile.ZipInfo(f"{stem}/data/{entry.key}")
            # 30 bytes of local header, the name, 20 of zip64 sizes, 4 of padding's own header
            start = file.tell() + 30 + len(info.filename) + 20 + 4
            padding = -start % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            with archive.open(info, "w", force_zip64=True) as record:
                for data in content(name):
                    record.write(data)
        archive.writestr(zipfile.ZipInfo(f"{stem}/version"), b"3\n")
