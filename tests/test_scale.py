"""True 7B shapes: 13.5 GB pass through in constant memory. Heavy: needs 28 GB of disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest

import synthetic
from llamalab import catalog
from llamalab.checkpoint import HFCheckpoint


def anonymous_memory(pid: int) -> int:
    """Return a process's anonymous memory in bytes; mapped file pages are not in it."""
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


@pytest.mark.heavy
def test_a_7b_converts_in_constant_memory(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("anonymous memory is read from /proc, which only Linux has")
    if shutil.disk_usage(tmp_path).free < 28e9:
        pytest.skip("28 GB of disk are needed")
    part = catalog.parts()["llama-7b"]
    source = synthetic.write_large_meta(tmp_path / "7B", part)
    size = sum(p.stat().st_size for p in source.iterdir())
    assert abs(size - part.files["7B/consolidated.00.pth"].size) < 2e6
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(
        [sys.executable, "-m", "llamalab.cli", "convert", "--input-dir", str(source)]
        + ["--output-dir", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        try:
            peak = max(peak, anonymous_memory(process.pid))
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.02)
    printed = process.communicate()[0]
    seconds = time.monotonic() - began
    try:
        assert process.returncode == 0
        made = HFCheckpoint(tmp_path / "out")
        assert made.total_bytes == 13_476_831_232 and made.vocab_size == 32000
        assert made.config["num_hidden_layers"] == 32
        print(
            f"\n{printed}{size / 1e9:.1f} GB in {seconds:.0f} s, peak RssAnon {peak / 1e6:.0f} MB"
        )
        assert peak < 1e9
    finally:
        shutil.rmtree(tmp_path / "out")
        os.unlink(source / "consolidated.00.pth")
