"""Writing: valid files by another reader, whole or absent, resumed without a difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import llamalab
from llamalab import units
from llamalab.checkpoints import output_directory, writer
from llamalab.checkpoints.checkpoint import digest_tensors
from llamalab.checkpoints.layouts import RECORD, HFCheckpoint, open_checkpoint
from llamalab.checkpoints.output_directory import OutputDirectory
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
    record = json.loads((family / "base-hf" / RECORD).read_text())
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
        (out / RECORD).write_text(text)
        with pytest.raises(OutputExists, match="not made by llamalab"):
            llamalab.convert(family / "base", out)


def test_a_directory_filled_while_we_write_is_kept(family, tmp_path, monkeypatch):
    out, put = tmp_path / "out", OutputDirectory.put_in_place

    def fill(*arguments):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        put(*arguments)

    monkeypatch.setattr(OutputDirectory, "put_in_place", fill)
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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # the old model, too, is gone
    if stop != "after":
        assert (out / "model.safetensors").stat().st_mtime_ns == stamp


def test_the_old_model_is_kept_while_nothing_stands_in_its_place(family, tmp_path):
    """Cut off between the two renames, and then somebody makes an empty directory."""
    aside = tmp_path / ".out.replaced"
    llamalab.convert(family / "base", tmp_path / "out", context_length=9)
    (tmp_path / "out").rename(aside)
    (tmp_path / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "_write_shards", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llamalab.convert(family / "base", tmp_path / "out")
    assert (aside / "model.safetensors").is_file()


def test_a_link_to_another_disk_is_followed(family, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "big" / "model")
    llamalab.convert(family / "base", tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "big/model/config.json").is_file()


SLOW = """
import sys, time
import llamalab
from llamalab.checkpoints.tensor_file import TensorFile
read = TensorFile.read
def slowly(self, *arguments):
    time.sleep(0.02)
    print("read", flush=True)
    return read(self, *arguments)
TensorFile.read = slowly
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


def cut_off(monkeypatch, action, shards: int):
    """Run `action` until so many shards are finished, and cut it off there."""
    write_shard, finished = writer._write_shard, []

    def cut(*arguments):
        if len(finished) == shards:
            raise KeyboardInterrupt
        finished.append(arguments)
        return write_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "_write_shard", cut)
        with pytest.raises(KeyboardInterrupt):
            action()


@pytest.mark.parametrize("whole", [False, True])
def test_another_file_with_the_old_size_and_time_is_noticed(copied, tmp_path, monkeypatch, whole):
    """As `cp -p` and `rsync -t` leave one."""
    base, out = copied("base"), tmp_path / "out"
    path = base / "7B/consolidated.00.pth"

    def convert():
        return llamalab.convert(base, out, max_shard_size="40KB")

    convert() if whole else cut_off(monkeypatch, convert, 3)
    before, tensors = path.stat(), torch.load(path, weights_only=True)
    for tensor in tensors.values():
        tensor += 0.5
    torch.save(tensors, tmp_path / "consolidated.00.pth")  # by the same name, so of the same size
    os.replace(tmp_path / "consolidated.00.pth", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    if whole:
        with pytest.raises(OutOfDate, match="has changed"):
            convert()
    else:
        calm = llamalab.convert(base, tmp_path / "calm", max_shard_size="40KB")
        assert convert().tensor_digest == calm.tensor_digest


@pytest.mark.parametrize("damage", ["shortened", "another version", "no journal"])
def test_a_finished_shard_that_cannot_be_trusted_is_made_again(
    family, tmp_path, monkeypatch, damage
):
    out, partial = tmp_path / "out", tmp_path / ".out.partial"

    def convert():
        return llamalab.convert(family / "base", out, max_shard_size="40KB")

    cut_off(monkeypatch, convert, 3)
    shards = {path: path.stat().st_mtime_ns for path in sorted(partial.glob("*.safetensors"))}
    assert len(shards) == 3
    if damage == "shortened":
        os.truncate(next(iter(shards)), 100)
    elif damage == "another version":
        monkeypatch.setattr(output_directory, "__version__", "99.0")
    else:
        (partial / output_directory.JOURNAL).write_text("[]")
    made = convert()
    again = [p for p, stamp in shards.items() if (out / p.name).stat().st_mtime_ns != stamp]
    assert len(again) == (1 if damage == "shortened" else 3)
    assert digest_tensors(open_checkpoint(out)) == digest_tensors(
        open_checkpoint(family / "base-hf")
    )
    assert made.tensor_digest


def test_what_somebody_else_keeps_in_the_work_directory_is_left_alone(family, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExists, match=r"thesis\.txt"):
        llamalab.convert(family / "base", tmp_path / "out")
    assert (tmp_path / ".out.partial" / "thesis.txt").read_text() == "years of work"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".new.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputExists, match="is a link"):
        llamalab.convert(family / "base", tmp_path / "new")


def test_a_journal_left_in_a_whole_directory_is_cleared_away(family, tmp_path):
    llamalab.convert(family / "base", tmp_path / "out")
    (tmp_path / "out" / output_directory.JOURNAL).write_text("{}")
    assert llamalab.convert(family / "base", tmp_path / "out").already
    assert not (tmp_path / "out" / output_directory.JOURNAL).exists()


def test_everything_is_on_the_disk_before_it_gets_its_name(family, tmp_path, monkeypatch):
    """After a power cut a name may stand without its bytes, unless they were synced before."""
    events, sync, replace, rename = [], os.fsync, os.replace, type(tmp_path).rename

    def name_of(descriptor):
        return os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))

    def synced(descriptor):
        events.append(("sync", name_of(descriptor)))
        sync(descriptor)

    def replaced(old, new):
        events.append(("name", os.path.basename(old)))
        replace(old, new)

    def renamed(self, target):
        events.append(("place", self.name))
        return rename(self, target)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("file names are read from /proc, which only Linux has")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(type(tmp_path), "rename", renamed)
    llamalab.convert(family / "base", tmp_path / "out", max_shard_size="60KB")
    for number, (kind, name) in enumerate(events):
        if kind == "name":
            assert ("sync", name) in events[:number], name
    place = events.index(("place", ".out.partial"))
    assert ("sync", ".out.partial") in events[:place]
    assert {name for kind, name in events[place:] if kind == "sync"} == {"out", tmp_path.name}
    assert sum(kind == "name" for kind, _ in events) > 8


def test_a_file_is_let_go_with_the_last_use(family):
    """Or a deleted model would keep its place on the disk."""
    import gc

    gc.collect()
    gc.disable()
    try:
        made = HFCheckpoint(family / "base-hf")
        made.read("lm_head.weight")
        path = str(family / "base-hf" / "model.safetensors")
        with open("/proc/self/maps", encoding="utf-8") as maps:
            assert path in maps.read()
        del made
        with open("/proc/self/maps", encoding="utf-8") as maps:
            assert path not in maps.read()
    finally:
        gc.enable()


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
    assert (tmp_path / "out" / RECORD).exists()


def test_overwriting_keeps_the_old_until_the_new_is_whole(family, tmp_path):
    out = tmp_path / "out"
    llamalab.convert(family / "base", out)
    old = (out / "model.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputDirectory, "put_in_place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llamalab.convert(family / "base", out, context_length=5, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == old
    llamalab.convert(family / "base", out, context_length=5, overwrite=True)
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 5


@given(st.integers(1, 10**15))
def test_sizes_in_bytes(number):
    assert units.parse_size(number) == units.parse_size(f" {number} ") == number


@pytest.mark.parametrize(
    "text, size",
    [("2GB", 2 * 10**9), ("1.5 MB", 1_500_000), ("1GiB", 2**30), ("7kb", 7000)],
)
def test_sizes_with_units(text, size):
    assert units.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "2 bananas", "1e9"])
def test_no_sizes(text):
    with pytest.raises(UsageError, match="not a size"):
        units.parse_size(text)
