"""Cuts, full disks and changing inputs, against the real command line: never half a model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time

import pytest

import crashes
import llamalab
import synthetic
from llamalab.checkpoints import tensor_file, writer
from llamalab.errors import DamagedFile, NotEnoughRoom, UsageError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    started = crashes.Runs(tmp_path_factory.mktemp("runs"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base of 5 MB, so that there is something to be cut in two; its HF form beside it."""
    root = tmp_path_factory.mktemp("base")
    tensors, params = synthetic.meta_tensors(dim=256, layers=4, heads=4)
    synthetic.write_meta(root / "7B", tensors, params)
    synthetic.english_tokenizer(root / "tokenizer.model")
    llamalab.convert(root, root / "hf")
    synthetic.write_adapter(root / "lora", root / "hf", root / "tokenizer.model")
    return root


def commands(base, out) -> dict[str, list]:
    to = ["--max-shard-size", "400KB", "--output-dir", out]
    merge = ["merge", "--lora-model", base / "lora", "--base-model"]
    return {
        "convert": ["convert", "--input-dir", base, "--model-size", "7B", *to],
        "merge": [*merge, base / "hf", *to],
        "fused": [*merge, base, "--model-size", "7B", *to],
    }


@pytest.mark.parametrize("route", ["convert", "merge", "fused"])
def test_killed_at_twenty_random_points(runs, base, tmp_path, route):
    out = tmp_path / "out"
    met = crashes.kill_and_resume(runs, commands(base, out)[route], out, kills=20, seed=7)
    assert met["absent"] >= 5 and met["resumed"] >= 3 and met["kept"] >= 5, met


def test_half_a_model_would_be_noticed(runs, base, tmp_path):
    """The judge of the test above, on a model of which a byte is wrong."""
    out = tmp_path / "out"
    assert runs.run(*commands(base, out)["convert"]) == 0
    wanted = crashes.recomputed_digest(out)
    shard = sorted(out.glob("*.safetensors"))[1]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert crashes.recomputed_digest(out) != wanted


def test_interrupted_it_is_tidy_and_says_how_to_go_on(runs, base, tmp_path):
    out = tmp_path / "out"
    command, partial = commands(base, out)["fused"], tmp_path / ".out.partial"
    for _ in range(20):  # until one is met in the middle
        pid = runs.start(*command)
        while len(crashes.shards_of(partial)) < 4 and not out.exists():
            time.sleep(0.001)
        runs.signal(pid, signal.SIGINT)
        code = runs.end()
        if not out.exists():
            break
        shutil.rmtree(out)
    assert code == 130
    assert "the same command goes on from there" in runs.errors.read_text()
    assert "Traceback" not in runs.errors.read_text()
    kept = crashes.shards_of(partial)
    assert not list(partial.glob("*.unfinished"))
    assert runs.run(*command) == 0
    again = [name for name, stamp in kept.items() if crashes.shards_of(out)[name] != stamp]
    assert len(kept) >= 4 and len(again) <= 1  # the last one may not have been noted yet


def test_a_source_truncated_between_two_tries_is_noticed(runs, base, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(base, source)
    command, partial = commands(source, out)["convert"], tmp_path / ".out.partial"
    pid = runs.start(*command)
    while not list(partial.glob("*.safetensors")) and not out.exists():
        time.sleep(0.001)
    runs.signal(pid, signal.SIGKILL)
    runs.end()
    shutil.rmtree(out, ignore_errors=True)
    weights = source / "7B" / "consolidated.00.pth"
    os.truncate(weights, weights.stat().st_size - 1000)
    assert runs.run(*command) == 1
    assert "cut off" in runs.errors.read_text() and str(weights) in runs.errors.read_text()
    assert not out.exists()


def test_a_source_that_changes_while_it_is_read_is_noticed(base, tmp_path, monkeypatch):
    source = shutil.copytree(base, tmp_path / "source")
    weights, read = source / "7B" / "consolidated.00.pth", tensor_file.TensorFile.read

    def read_and_change(self, *arguments):
        os.utime(weights)
        return read(self, *arguments)

    monkeypatch.setattr(tensor_file.TensorFile, "read", read_and_change)
    with pytest.raises(DamagedFile, match="has changed while it was read"):
        llamalab.convert(source, tmp_path / "out", model_size="7B")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, and a function that makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system needs root and the right to mount")

    def grow(size):
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)

    yield place, grow
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_leaves_what_is_finished(base, small_disk, monkeypatch):
    disk, grow = small_disk
    # Foreseen it would be refused at once; here somebody else fills the disk meanwhile.
    monkeypatch.setattr(writer, "require_room", lambda *_: None)
    settings = {"model_size": "7B", "max_shard_size": "400KB"}
    with pytest.raises(NotEnoughRoom, match="The disk is full") as caught:
        llamalab.convert(base, disk / "out", **settings)
    assert "run the same command again" in caught.value.fix
    assert [path.name for path in disk.iterdir()] == [".out.partial"]
    kept = crashes.shards_of(disk / ".out.partial")
    assert kept and not list((disk / ".out.partial").glob("*.unfinished"))
    grow("64m")
    made = llamalab.convert(base, disk / "out", **settings)
    assert {name: crashes.shards_of(disk / "out")[name] for name in kept} == kept
    assert made.tensor_digest == crashes.recomputed_digest(base / "hf")


def test_a_disk_too_small_is_refused_before_the_first_byte(base, small_disk):
    disk, _ = small_disk
    with pytest.raises(NotEnoughRoom, match="are free"):
        llamalab.convert(base, disk / "out", model_size="7B")
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("size", ["280k", "290k", "300k"])
def test_a_disk_that_fills_up_at_the_small_files(family, small_disk, monkeypatch, size):
    disk, grow = small_disk
    grow(size)
    monkeypatch.setattr(writer, "require_room", lambda *_: None)
    with pytest.raises(NotEnoughRoom, match="The disk is full"):
        llamalab.merge(family / "base", family / "llama-lora", disk / "out")
    assert not (disk / "out").exists()


def test_a_mounted_disk_itself_cannot_be_the_output(base, small_disk):
    disk, _ = small_disk
    with pytest.raises(UsageError, match="file system of its own"):
        llamalab.convert(base, disk, model_size="7B")
    assert list(disk.iterdir()) == []
