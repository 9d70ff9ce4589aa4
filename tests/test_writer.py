"""Writing: valid files by another reader, whole or absent, resumed without a difference."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import llamalab
from llamalab import writer
from llamalab.checkpoint import HFCheckpoint, open_checkpoint
from llamalab.errors import NotEnoughRoom, OutOfDate, OutputExists, UsageError


def test_safetensors_reads_what_was_written(family):
    wanted = torch.load(family / "base/7B/consolidated.00.pth", weights_only=True)
    found = load_file(family / "base-hf/model.safetensors")
    assert torch.equal(found["lm_head.weight"], wanted["output.weight"])
    assert len(found) == len(wanted) - 1  # rope.freqs is dropped


def test_shards_hold_the_same_tensors(family, tmp_path):
    whole = llamalab.convert(family / "base", tmp_path / "whole")
    split = llamalab.convert(family / "base", tmp_path / "split", max_shard_size="60KB")
    assert whole.tensor_digest == split.tensor_digest
    index = json.loads((tmp_path / "split/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == whole.total_bytes
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "split" / file)
    for file in files:
        held = load_file(tmp_path / "split" / file)
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= 60_000


def test_torch_reads_the_archive(family, tmp_path):
    llamalab.merge(family / "base", family / "llama-lora", tmp_path / "m", output_type="pth")
    path = tmp_path / "m" / "consolidated.00.pth"
    assert zipfile.ZipFile(path).testzip() is None  # every checksum in it is right
    for mapped in (False, True):
        held = torch.load(path, weights_only=True, mmap=mapped)
        made = open_checkpoint(tmp_path / "m")
        assert all(torch.equal(held[name], made.read(name)) for name in made.tensors)
        assert all(tensor.data_ptr() % 16 == 0 for tensor in held.values())


def test_the_record_tells_inputs_and_digest(family):
    record = json.loads((family / "base-hf" / writer.RECORD).read_text())
    by_name = {os.path.basename(entry["path"]): entry for entry in record["inputs"]}
    content = (family / "base/7B/consolidated.00.pth").read_bytes()
    import hashlib

    assert by_name["consolidated.00.pth"]["sha256"] == hashlib.sha256(content).hexdigest()
    made = HFCheckpoint(family / "base-hf")
    lines = []
    for name in sorted(made.tensors):
        tensor = made.read(name)
        shape = "x".join(str(n) for n in tensor.shape)
        sha256 = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        lines.append(f"{name} F16 {shape} {sha256}\n")
    assert record["tensor_digest"] == hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_same_again_is_already_made_and_a_change_is_noticed(family, copied, tmp_path):
    base = copied("base")
    first = llamalab.convert(base, tmp_path / "out")
    stamp = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    again = llamalab.convert(base, tmp_path / "out")
    assert not first.already and again.already and again.tensor_digest == first.tensor_digest
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == stamp
    os.utime(base / "7B/params.json")  # only touched: the bytes decide
    assert llamalab.convert(base, tmp_path / "out").already
    with pytest.raises(OutputExists, match="other settings"):
        llamalab.convert(base, tmp_path / "out", context_length=9)
    params = base / "7B/params.json"
    params.write_text(params.read_text() + "\n")
    with pytest.raises(OutputExists, match="has changed"):
        llamalab.convert(base, tmp_path / "out")


def test_a_full_disk_is_foreseen(family, tmp_path, monkeypatch):
    import collections
    import shutil

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(NotEnoughRoom, match="needed"):
        llamalab.convert(family / "base", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_longer_whole_is_not_already_made(family, tmp_path):
    out = tmp_path / "out"
    llamalab.convert(family / "base", out)
    for name in ("tokenizer.model", "config.json", "model.safetensors"):
        content = (out / name).read_bytes()
        (out / name).write_bytes(content[:-7])
        with pytest.raises(OutOfDate, match="missing or has changed"):
            llamalab.convert(family / "base", out)
        (out / name).write_bytes(content)
    assert llamalab.convert(family / "base", out).already
    for text in ("{}", "[]", "", "{"):
        (out / writer.RECORD).write_text(text)
        with pytest.raises(OutputExists, match="not made by llamalab"):
            llamalab.convert(family / "base", out)


def test_a_directory_filled_while_we_write_is_kept(family, tmp_path, monkeypatch):
    out, put = tmp_path / "out", writer._put_in_place

    def fill(*arguments):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        put(*arguments)

    monkeypatch.setattr(writer, "_put_in_place", fill)
    with pytest.raises(OutputExists, match="filled while"):
        llamalab.convert(family / "base", out)
    assert (out / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("stop", ["before", "between", "after"])
def test_cut_off_at_the_renames_nothing_is_lost(family, tmp_path, monkeypatch, stop):
    """The old model is there or comes back; the finished new one is not written again."""
    out = tmp_path / "out"
    llamalab.convert(family / "base", out)
    renames, rename = [], type(out).rename

    def cut(self, target):
        renames.append(target)
        if stop == "before" or (stop == "between" and len(renames) == 2):
            raise KeyboardInterrupt
        rename(self, target)
        if stop == "after" and len(renames) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(type(out), "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        llamalab.convert(family / "base", out, context_length=9, overwrite=True)
    monkeypatch.undo()
    finished = tmp_path / ".out.partial" / "model.safetensors"
    stamp = finished.stat().st_mtime_ns if stop != "after" else 0
    made = llamalab.convert(family / "base", out, context_length=9, overwrite=True)
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 9
    assert made.already == (stop == "after")
    if stop != "after":
        assert (out / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_link_to_another_disk_is_followed(family, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "model")
    llamalab.convert(family / "base", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big/model/config.json").is_file()


SLOW = """
import sys, time
import llamalab
from llamalab import checkpoint
read = checkpoint.TensorFile.read
def slowly(self, *arguments):
    time.sleep(0.02)
    print("read", flush=True)
    return read(self, *arguments)
checkpoint.TensorFile.read = slowly
llamalab.merge(*sys.argv[1:4], max_shard_size="40KB")
"""


def start_slow_merge(family, out):
    arguments = [str(family / "base"), str(family / "llama-lora"), str(out)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", SLOW, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "reads, how", [(5, signal.SIGKILL), (25, signal.SIGKILL), (50, signal.SIGINT)]
)
def test_a_run_cut_off_leaves_nothing_whole_and_is_resumed(family, tmp_path, reads, how):
    out = tmp_path / "out"
    process = start_slow_merge(family, out)
    for _ in range(reads):
        process.stdout.readline()
    process.send_signal(how)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob(".out.partial/*.safetensors")}
    made = llamalab.merge(family / "base", family / "llama-lora", out, max_shard_size="40KB")
    wanted = llamalab.merge(
        family / "base", family / "llama-lora", tmp_path / "calm", max_shard_size="40KB"
    )
    assert made.tensor_digest == wanted.tensor_digest
    for file in (tmp_path / "calm").glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    for name, stamp in finished.items():
        if (
            name
            in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"].values()
        ):
            assert (out / name).stat().st_mtime_ns == stamp  # kept, not written again
    assert reads < 50 or finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calm", "out"]


def test_a_changed_input_is_not_resumed(family, copied, tmp_path):
    base, out = copied("base"), tmp_path / "out"
    process = start_slow_merge(tmp_path_family(base, family, tmp_path), out)
    for _ in range(50):
        process.stdout.readline()
    process.kill()
    process.communicate(timeout=60)
    assert list(tmp_path.glob(".out.partial/*.safetensors"))
    tensors = torch.load(base / "7B/consolidated.00.pth", weights_only=True)
    for tensor in tensors.values():
        tensor += 0.5
    torch.save(tensors, base / "7B/consolidated.00.pth")
    made = llamalab.merge(base, family / "llama-lora", out, max_shard_size="40KB")
    calm = llamalab.merge(base, family / "llama-lora", tmp_path / "calm", max_shard_size="40KB")
    assert made.tensor_digest == calm.tensor_digest


def tmp_path_family(base, family, tmp_path):
    """A family directory whose base is the copy, and whose adapter is the shared one."""
    (tmp_path / "llama-lora").symlink_to(family / "llama-lora")
    return tmp_path


def test_two_processes_with_one_output(family, tmp_path):
    process = start_slow_merge(family, tmp_path / "out")
    for _ in range(20):  # it has begun to write
        process.stdout.readline()
    try:
        with pytest.raises(OutputExists, match="Another process"):
            llamalab.merge(
                family / "base", family / "llama-lora", tmp_path / "out", max_shard_size="40KB"
            )
    finally:
        process.communicate(timeout=120)
    assert process.returncode == 0
    assert (tmp_path / "out" / writer.RECORD).exists()


def test_overwriting_keeps_the_old_until_the_new_is_whole(family, tmp_path):
    out = tmp_path / "out"
    llamalab.convert(family / "base", out)
    old = (out / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_put_in_place", lambda partial, out, overwrite: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llamalab.convert(family / "base", out, context_length=5, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == old
    llamalab.convert(family / "base", out, context_length=5, overwrite=True)
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 5


@given(st.integers(1, 10**15))
def test_sizes_in_bytes(number):
    assert writer.parse_size(number) == writer.parse_size(f" {number} ") == number


@pytest.mark.parametrize(
    "text, size",
    [("2GB", 2 * 10**9), ("1.5 MB", 1_500_000), ("1GiB", 2**30), ("7kb", 7000)],
)
def test_sizes_with_units(text, size):
    assert writer.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 bananas", "1e9"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match="not a size"):
        writer.parse_size(text)
