"""The containers: every byte arrives, whatever the length, the pieces and the file system."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llamalab.checkpoints import containers
from llamalab.checkpoints.checkpoint import TensorSpec, raw_bytes
from llamalab.checkpoints.containers import DirectFile, write_safetensors, write_torch_archive

PIECE = 16 * 2**20


def random_bytes(length: int) -> bytes:
    return torch.randint(0, 256, (length,), dtype=torch.uint8).numpy().tobytes()


def write_in_pieces(path, data: bytes, piece: int) -> None:
    with DirectFile(path) as file:
        for start in range(0, len(data), piece):
            assert file.write(data[start : start + piece]) == len(data[start : start + piece])
        assert file.tell() == len(data)


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, 2 * PIECE + 5])
def test_every_byte_arrives(tmp_path, length):
    data = random_bytes(length)
    write_in_pieces(tmp_path / "file", data, 3_333_333)
    assert (tmp_path / "file").read_bytes() == data


@settings(max_examples=20)
@given(st.lists(st.integers(0, 100_000), max_size=30))
def test_in_pieces_of_any_size(tmp_path_factory, sizes):
    path, pieces = tmp_path_factory.mktemp("direct") / "file", [random_bytes(n) for n in sizes]
    with DirectFile(path) as file:
        for piece in pieces:
            file.write(piece)
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("refused_by", ["open", "write"])
def test_a_file_system_without_direct_writing(tmp_path, monkeypatch, refused_by):
    """Some refuse it when the file is opened, some only when it is written."""
    direct, call = getattr(os, "O_DIRECT", 0), getattr(os, refused_by)
    if not direct:
        pytest.skip("this system has no direct writing to be refused")
    refusals = []

    def refuse(what, *arguments):
        flags = arguments[0] if refused_by == "open" else fcntl.fcntl(what, fcntl.F_GETFL)
        if flags & direct:
            refusals.append(flags)
            raise OSError(errno.EINVAL, "Invalid argument")
        return call(what, *arguments)

    data = random_bytes(PIECE + 5000)
    with monkeypatch.context() as patch:
        patch.setattr(containers.os, refused_by, refuse)
        write_in_pieces(tmp_path / "file", data, 1_000_000)
    assert refusals and (tmp_path / "file").read_bytes() == data


def test_a_slow_disk_gets_the_same_bytes(tmp_path, monkeypatch):
    """A buffer must not be filled again while it is being written."""
    call = os.write

    def slowly(descriptor, data):
        time.sleep(0.05)
        return call(descriptor, data)

    data = random_bytes(4 * PIECE + 77)
    with monkeypatch.context() as patch:
        patch.setattr(containers.os, "write", slowly)
        write_in_pieces(tmp_path / "file", data, PIECE)
    assert (tmp_path / "file").read_bytes() == data


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(containers.os, "write", full)
    with pytest.raises(OSError, match="No space"), DirectFile(tmp_path / "file") as file:
        for _ in range(3):
            file.write(bytes(PIECE))


def test_other_readers_find_the_tensors(tmp_path):
    tensors = {
        "a": torch.randn(300, 70).half(),
        "b.weight": torch.randn(5).bfloat16(),
        "c": torch.randn(2, 3, 4),
    }
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}

    def content(name):
        return (raw_bytes(row) for row in tensors[name])

    with DirectFile(tmp_path / "w.safetensors") as file:
        write_safetensors(file, specs, content)
    with DirectFile(tmp_path / "w.pth") as file:
        write_torch_archive(file, "w", specs, content)
    assert zipfile.ZipFile(tmp_path / "w.pth").testzip() is None
    for held in (
        load_file(tmp_path / "w.safetensors"),
        torch.load(tmp_path / "w.pth", weights_only=True),
        torch.load(tmp_path / "w.pth", weights_only=True, mmap=True),
    ):
        assert held.keys() == tensors.keys()
        assert all(torch.equal(held[name], tensors[name]) for name in tensors)
