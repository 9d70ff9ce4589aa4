"""True shapes: constant memory from 7B to 70B, and kills while gigabytes are written.

Heavy: up to 45 GB of disk. Of a 13B and a 70B, which would take hundreds of gigabytes, one full
layer of the true shapes stands for all of them, beside the embeddings.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import crashes
import made_up_weights
from llamalab import catalog
from llamalab.checkpoints.layouts import HFCheckpoint
from made_up_weights import SIZES

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"),
        reason="anonymous memory is read from /proc, which only Linux has",
    ),
]


def anonymous_memory(pid: int) -> int:
    """Return a process's anonymous memory in bytes; mapped file pages are not in it."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


def peak_memory(*arguments) -> int:
    """Run a command; return the most anonymous memory that it held, in bytes."""
    began, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "llamalab", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            peak = max(peak, anonymous_memory(process.pid))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.01)
    assert process.wait() == 0
    print(f"\n{arguments[0]}: {time.monotonic() - began:.0f} s, peak RssAnon {peak / 1e6:.0f} MB")
    return peak


def require_disk(path, gigabytes: float) -> None:
    if shutil.disk_usage(path).free < gigabytes * 1e9:
        pytest.skip(f"{gigabytes} GB of disk are needed")


@pytest.mark.parametrize("size, shards, layers", [("7b", 1, 32), ("13b", 2, 1), ("70b", 8, 1)])
def test_memory_does_not_grow_with_the_model(tmp_path, size, shards, layers):
    require_disk(tmp_path, 45 if size == "7b" else 12)
    shape, base, out = replace(SIZES[size], layers=layers), tmp_path / "base", tmp_path / "out"
    folder = made_up_weights.write_base(base, shape, shards=shards)
    if size == "7b":
        published = catalog.parts()["llama-7b"].files["7B/consolidated.00.pth"].size
        assert abs((folder / "consolidated.00.pth").stat().st_size - published) < 2e6
    adapter = made_up_weights.write_adapter(tmp_path / "lora", shape, base / "tokenizer.model")
    to = ("--lora-model", adapter, "--output-dir", out)
    try:
        assert peak_memory("convert", "--input-dir", base, "--output-dir", tmp_path / "hf") < 300e6
        made = HFCheckpoint(tmp_path / "hf")
        assert made.vocab_size == 32000 and made.config["num_hidden_layers"] == layers
        assert peak_memory("merge", "--base-model", tmp_path / "hf", *to) < 300e6
        shutil.rmtree(out)
        shutil.rmtree(tmp_path / "hf")
        assert peak_memory("merge", "--base-model", base, *to) < 300e6
        assert HFCheckpoint(out).vocab_size == made_up_weights.EXTENDED
        shutil.rmtree(out)
        for kind in ("f16", "q8_0"):
            to = ("--to", "gguf", "--type", kind, "--output", tmp_path / "m.gguf", "--overwrite")
            assert peak_memory("export", "--model", base, "--lora-model", adapter, *to) < 300e6
    finally:
        shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def one_billion(tmp_path_factory):
    root = tmp_path_factory.mktemp("1b")
    require_disk(root, 12)
    made_up_weights.write_base(root / "base", SIZES["1b"])
    made_up_weights.write_adapter(root / "lora", SIZES["1b"], root / "base" / "tokenizer.model")
    runs = crashes.Runs(root)
    convert = ["convert", "--input-dir", root / "base", "--output-dir", root / "hf"]
    assert runs.run(*convert) == 0
    yield root, runs
    runs.close()
    shutil.rmtree(root)


@pytest.mark.parametrize("route", ["convert", "merge", "fused"])
def test_killed_at_twenty_random_points(one_billion, route):
    root, runs = one_billion
    out = root / "out"
    to = ["--max-shard-size", "200MB", "--output-dir", out]
    merge = ["merge", "--lora-model", root / "lora", "--base-model"]
    command = {
        "convert": ["convert", "--input-dir", root / "base", *to],
        "merge": [*merge, root / "hf", *to],
        "fused": [*merge, root / "base", *to],
    }[route]
    met = crashes.kill_and_resume(runs, command, out, kills=20, seed=7)
    print(f"\n{route}: {met}")
    assert met["absent"] >= 5 and met["kept"] >= 5
    shutil.rmtree(out)
