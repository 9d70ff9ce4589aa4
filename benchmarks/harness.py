"""What the benchmarks share: run commands beside each other, and say what each of them took.

Contenders run in turns, round after round, each from the same state: the inputs' pages dropped
from the cache, its own output removed, everything else on the disk. Only the ratios of one run
mean anything on a machine that others use too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import psutil

from llamalab.catalog.models_dir import project_directory

PEER = "4.46.3"
"""The last line of transformers whose wheel has the script that converts LLaMA."""


@dataclass
class Contender:
    """One way to do a job.

    `command` is run without a shell; `output` is what it makes, removed before and after each
    run. `repeats` bounds the rounds it takes part in. `check` looks at the last output, and
    returns a sentence for the table's foot.
    """

    name: str
    command: Sequence[str]
    output: Path | None = None
    repeats: int = 1000
    environment: dict[str, str] = field(default_factory=dict)
    check: Callable[[], str] | None = None


@dataclass
class Row:
    """What a contender took: seconds a round, and in bytes the most that it held and moved.

    `anonymous` is memory of its own (RssAnon), `mapped` pages of files (RssFile), which the
    system takes back when it needs them; `read` and `written` went to and from the disk.
    """

    name: str
    seconds: list[float]
    anonymous: int = 0
    mapped: int = 0
    read: int = 0
    written: int = 0
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compete(contenders: Sequence[Contender], inputs: Sequence[Path], repeats: int) -> list[Row]:
    """Run every contender up to `repeats` times, in turns, and return a row for each."""
    rows = {contender.name: Row(contender.name, []) for contender in contenders}
    for number in range(repeats):
        for contender in contenders:
            if number >= contender.repeats:
                continue
            print(f"round {number + 1}: {contender.name}", file=sys.stderr, flush=True)
            _remove(contender.output)
            _drop_pages(inputs)
            row = rows[contender.name]
            _run(contender, row)
            if contender.check and number + 1 == min(repeats, contender.repeats):
                row.note = contender.check()
            _remove(contender.output)
    return list(rows.values())


def _run(contender: Contender, row: Row) -> None:
    environment = os.environ | {"TQDM_DISABLE": "1"} | contender.environment
    began = time.perf_counter()
    errors = tempfile.TemporaryFile()
    process = subprocess.Popen(
        contender.command, env=environment, stdout=subprocess.DEVNULL, stderr=errors
    )
    status = usage = None
    while True:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            break
        held = memory(process.pid)
        row.anonymous = max(row.anonymous, held["RssAnon"])
        row.mapped = max(row.mapped, held["RssFile"])
        time.sleep(0.01)
    row.seconds.append(time.perf_counter() - began)
    process.returncode = os.waitstatus_to_exitcode(status)
    errors.seek(0)
    with errors:
        if process.returncode:
            raise SystemExit(f"{contender.name} failed:\n{errors.read().decode()}")
    row.read, row.written = 512 * usage.ru_inblock, 512 * usage.ru_oublock


def memory(pid: int) -> dict[str, int]:
    """Return the bytes that a process holds now: of its own (RssAnon), and of files (RssFile)."""
    held = {"RssAnon": 0, "RssFile": 0}
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in held:
                    held[name] = int(rest.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has just ended
    return held


def _remove(output: Path | None) -> None:
    if output and output.is_dir():
        shutil.rmtree(output)
    elif output:
        output.unlink(missing_ok=True)


def _drop_pages(inputs: Sequence[Path]) -> None:
    """Put everything on the disk, and take the inputs out of the page cache."""
    os.sync()
    for path in (file for given in inputs for file in [given, *given.rglob("*")]):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def peer_environment(work: Path) -> dict[str, str]:
    """Return the environment in which Python finds transformers 4.46.3, installed when missing."""
    directory = work / f"transformers-{PEER}"
    if not (directory / "finished").exists():
        shutil.rmtree(directory, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["--target", str(directory)]
        wanted = [f"transformers=={PEER}", "tokenizers<0.21", "huggingface-hub<1", "numpy<3"]
        # accelerate asks for PyTorch, which is there
        for more in (wanted, ["--no-deps", "accelerate==1.1.1", "psutil"]):
            done = subprocess.run([*pip, *more], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"transformers {PEER} could not be installed:\n{done.stderr}")
        (directory / "finished").touch()
    return {"PYTHONPATH": str(directory)}


def arguments(description: str) -> argparse.Namespace:
    """Parse the options that every benchmark of weights has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--size", default="7b", choices=["lab", "1b", "7b"])
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="rounds; default 3")
    parser.add_argument("--no-peers", action="store_true", help="leave the other programs out")
    parser.add_argument(
        "--work-dir",
        type=Path,
        default=project_directory() / "models" / "benchmarks",
        help="up to 60 GB at 7b; default models/benchmarks",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    # At 7B a peer takes minutes and is not the one whose spread matters.
    options.peer_repeats = 0 if options.no_peers else 1 if options.size == "7b" else 1000
    return options


def llamalab(*words: str | Path) -> list[str]:
    """Return the command line that runs `llamalab` with this Python."""
    return [sys.executable, "-m", "llamalab", *map(str, words)]


def report(title: str, rows: Sequence[Row], facts: dict, file: Path | None) -> None:
    """Print the table, each row beside the first one, and write the figures as JSON."""
    print(f"{title}\n{facts['machine']}; {facts['date']}; {facts['state']}\n")
    heads = ("", "seconds", "x cp", "RssAnon", "RssFile", "read", "written")
    cells = [heads, ("---", *("---:",) * 6)]
    for row in rows:
        # A round against the copy of the same round: the disk has its moods.
        ratios = [mine / cp for mine, cp in zip(row.seconds, rows[0].seconds, strict=False)]
        sizes = (row.anonymous, row.mapped, row.read, row.written)
        sizes = [f"{size / 1e6:,.0f} MB" for size in sizes]
        cells.append((row.name, _spread(row.seconds, 1), _spread(ratios, 2), *sizes))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(f"| {' | '.join(padded)} |")
    for row in rows:
        if row.note:
            print(f"\n{row.name}: {row.note}")
    if file:
        held = facts | {"rows": [asdict(row) | {"median": row.median} for row in rows]}
        file.write_text(json.dumps(held, indent=1) + "\n")


def _spread(values: Sequence[float], digits: int) -> str:
    """Return the median, and where there are several values their range."""
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return text
    return f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def facts(size: str, repeats: int | None = None) -> dict:
    """Return what a reader of the figures must know; of `compete`, where it took `repeats`."""
    memory = psutil.virtual_memory().total / 2**30
    versions = [f"{name} {version(name)}" for name in ("torch", "transformers", "peft")]
    told = {
        "size": size,
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, {memory:.0f} GiB, {platform.machine()}, "
        + ", ".join(versions),
    }
    if repeats:
        told["state"] = f"inputs not in the page cache; medians of {repeats} rounds, in turns"
    return told


_SHA256 = "import sys; from llamalab.checkpoints import hash_file; hash_file(sys.argv[1])"


def limits(file: Path, out: Path) -> list[Contender]:
    """Return the copy that everything is compared with, and what disk and hash allow."""
    count = max(1, file.stat().st_size // 2**24)
    return [
        Contender(
            "cp and fsync",
            ["sh", "-c", 'cp --reflink=never "$0" "$1" && sync "$1"', str(file), str(out)],
            out,
        ),
        Contender("only read it", ["dd", f"if={file}", "of=/dev/null", "bs=16M"]),
        Contender(
            "only write as much",
            ["dd", "if=/dev/zero", f"of={out}", "bs=16M", f"count={count}"]
            + ["oflag=direct", "conv=fsync"],
            out,
        ),
        Contender("only sha256", [sys.executable, "-c", _SHA256, str(file)]),
    ]
