"""Runs of the command line that can be killed: real processes, without the cost of starting each.

A parent that has loaded the package forks a child for every run, so that hundreds of kills take
seconds. What is left behind is then judged by the digest of an undisturbed run.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from llamalab.checkpoints.checkpoint import TensorSpec, digest_tensors, tensor_digest
from llamalab.checkpoints.layouts import open_checkpoint
from llamalab.checkpoints.output_directory import RECORD

SERVER = """
import json, os, sys
from llamalab.cli import main
from llamalab.surgery import convert, export, merge
for line in sys.stdin:
    arguments, error_file = json.loads(line)
    pid = os.fork()
    if pid == 0:
        for number, path in ((0, os.devnull), (1, os.devnull), (2, error_file)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os._exit(main(arguments))
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Runs:
    """Starts commands one after the other; `errors` is the file that holds the last one's."""

    def __init__(self, directory: Path):
        self.errors = directory / "stderr.txt"
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, *arguments) -> int:
        """Start a command; return its process id."""
        line = json.dumps([[str(item) for item in arguments], str(self.errors)])
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def end(self) -> int:
        """Wait for the command to end; return its exit code, -9 where it was killed."""
        return int(self._server.stdout.readline())

    def run(self, *arguments) -> int:
        self.start(*arguments)
        return self.end()

    @staticmethod
    def signal(pid: int, number: int) -> None:
        """Send a signal, unless the command was faster."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def recomputed_digest(directory: Path) -> str:
    """Return the tensor digest of what lies on the disk, from the bytes there."""
    made = open_checkpoint(directory)
    sums = digest_tensors(made)
    specs: dict[str, TensorSpec] = made.tensors
    return tensor_digest({name: (specs[name], sums[name]) for name in sums})


def shards_of(directory: Path) -> dict[str, int]:
    """Return shard name -> time of change, of the shards that have their final names."""
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.safetensors")}


def clear(out: Path) -> None:
    """Remove a model, if there is one."""
    if out.exists():
        for path in out.iterdir():
            path.unlink()
        out.rmdir()


def kill_and_resume(runs: Runs, command: list, out: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill `command` at random points, again and again, each try going on from the one before.

    Only a try that the signal met alive counts as a kill; one that was faster begins anew. Asserts
    after every try that `out` is absent or whole, and that a next try writes at most one finished
    shard again. Returns how often each state was met.
    """
    times = []
    for _ in range(3):  # the first is slower than the tries will be
        clear(out)
        began = time.monotonic()
        assert runs.run(*command) == 0, runs.errors.read_text()
        times.append(time.monotonic() - began)
    wanted = recomputed_digest(out)
    content = {p.name: p.read_bytes() for p in out.iterdir() if p.stat().st_size < 2**25}
    partial = out.with_name(f".{out.name}.partial")
    chance = random.Random(seed)
    met = {"killed": 0, "faster": 0, "absent": 0, "whole": 0, "resumed": 0, "kept": 0}
    clear(out)
    while met["killed"] < kills:
        assert met["faster"] < 5 * kills, met
        before = shards_of(partial)
        pid = runs.start(*command)
        time.sleep(chance.uniform(0, min(times)))
        runs.signal(pid, signal.SIGKILL)
        met["killed" if runs.end() == -signal.SIGKILL else "faster"] += 1
        after = shards_of(partial) if not out.exists() else shards_of(out)
        again = [name for name in before if after.get(name, before[name]) != before[name]]
        assert len(again) <= 1, f"written again: {again}"
        met["resumed"] += bool(before)
        met["kept"] += len(before) - len(again)
        if out.exists():
            met["whole"] += 1
            assert recomputed_digest(out) == wanted
            assert json.loads((out / RECORD).read_text())["tensor_digest"] == wanted
            clear(out)
        else:
            met["absent"] += 1
    assert runs.run(*command) == 0, runs.errors.read_text()
    assert recomputed_digest(out) == wanted
    found = {p.name: p.read_bytes() for p in out.iterdir() if p.stat().st_size < 2**25}
    for record in (content, found):
        record.pop(RECORD)
    assert found == content
    assert not partial.exists()
    return met
