"""How fast are `download` and `verify`, beside curl, md5sum and sha256sum on the same machine?

    python benchmarks/download.py [--quick]

The server is the package's own mirror in a process of its own, so that it takes none of our
interpreter's time. Contenders take turns; a figure is the median of its rounds. Files lie in
memory (/dev/shm) where there is room, so that the disk's mood decides nothing. Ours are calls in
this process: starting Python, half a second, is left out. A table comes first, then one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from llamalab import verify
from llamalab.catalog import FileFacts, Part, catalog
from llamalab.checkpoints.digests import hash_file
from llamalab.downloads import transfer

NAME = "consolidated.00.pth"
SERVER = """
import sys
from llamalab_course.file_server import serve_files
with serve_files(sys.argv[1], rate=float(sys.argv[2]) or None) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def mirror(folder: Path, rate: float = 0):
    """Serve `folder` from another process at `rate` bytes a second and connection; yield the URL."""
    command = [sys.executable, "-c", SERVER, str(folder), str(rate)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.stdin.close()


def seconds(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def take_turns(rounds: int, contenders: dict) -> dict[str, float]:
    """Return {name: median seconds} of contenders that take turns, each round in another order."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            times[name].append(seconds(contenders[name]))
        order.append(order.pop(0))
    return {name: statistics.median(values) for name, values in times.items()}


def write_file(path: Path, size: int) -> FileFacts:
    """Write a file that begins as a zip archive and goes on at random; return what is known of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    chance = random.Random(path.name)
    hashes = [hashlib.md5(), hashlib.sha256()]
    with open(path, "wb") as file:
        for start in range(0, size, 1 << 20):
            block = chance.randbytes(min(1 << 20, size - start))
            block = b"PK\x03\x04" + block[4:-22] + b"PK\x05\x06" + b"\0" * 18
            file.write(block)
            for value in hashes:
                value.update(block)
    return FileFacts(size, *(value.hexdigest() for value in hashes))


def ours(url: str, scratch: Path, connections: int):
    def run():
        shutil.rmtree(scratch, ignore_errors=True)
        transfer.download("part", scratch, [url], connections=connections)

    return run


def curl(url: str, scratch: Path):
    target = scratch.with_name("curl-file")

    def run():
        target.unlink(missing_ok=True)
        command = ["curl", "--silent", "--fail", "--noproxy", "*", "-o", str(target)]
        subprocess.run([*command, f"{url}/part/{NAME}"], check=True)

    return run


def bench_downloads(place: Path, megabytes: int, rounds: int) -> list[dict]:
    size = megabytes * 1_000_000
    facts = write_file(place / "served" / "part" / NAME, size)
    part = Part("part", "base", {NAME: facts}, vocab=1)
    catalog._tables = lambda: ({"part": part}, {})
    rows, scratch = [], place / "models"

    def add(what: str, times: dict[str, float]) -> None:
        rows.extend(
            {"what": what, "who": who, "rate": size / spent / 1e6} for who, spent in times.items()
        )

    with mirror(place / "served", rate=100e6) as url:
        contenders = {"llamalab, 1 connection": ours(url, scratch, 1), "curl": curl(url, scratch)}
        add("server throttled to 100 MB/s", take_turns(rounds, contenders))
    with mirror(place / "served", rate=25e6) as url:
        contenders = {
            "llamalab, 1 connection": ours(url, scratch, 1),
            "llamalab, 4 connections": ours(url, scratch, 4),
            "curl": curl(url, scratch),
        }
        add("throttled to 25 MB/s per connection", take_turns(rounds, contenders))
    with mirror(place / "served") as url:
        file = place / "served" / "part" / NAME
        contenders = {
            "llamalab, 1 connection": ours(url, scratch, 1),
            "llamalab, 4 connections": ours(url, scratch, 4),
            "curl, which checks nothing": curl(url, scratch),
            "md5 and sha256 of the file": lambda: hash_file(file, ["md5", "sha256"]),
        }
        add("not throttled", take_turns(rounds, contenders))
    return rows


def bench_verify(place: Path, files: int, megabytes: int, rounds: int) -> list[dict]:
    folder, size = place / "several", megabytes * 1_000_000
    names = [f"consolidated.{number:02d}.pth" for number in range(files)]
    known = {name: write_file(folder / name, size) for name in names}
    rows, total = [], files * size
    for kind in ("md5", "sha256"):
        only = {name: FileFacts(**{kind: getattr(facts, kind)}) for name, facts in known.items()}
        part = Part("several", "base", only, vocab=1)
        catalog._tables = lambda part=part: ({"several": part}, {})
        sums = place / f"sums.{kind}"
        sums.write_text("".join(f"{getattr(f, kind)}  {name}\n" for name, f in known.items()))

        def check(kind=kind, sums=sums):
            command = [f"{kind}sum", "--check", "--quiet", str(sums)]
            subprocess.run(command, cwd=folder, check=True)

        def verified():
            assert verify(folder).ok

        def read():
            with open(os.devnull, "wb") as nothing:
                subprocess.run(["cat", *names], cwd=folder, stdout=nothing, check=True)

        contenders = {"llamalab verify": verified, f"{kind}sum --check": check, "cat": read}
        times = take_turns(rounds, contenders)
        what = f"{files} files, {kind}"
        rows += [{"what": what, "who": who, "rate": total / t / 1e6} for who, t in times.items()]
    return rows


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small files, one round: does it run?")
    quick = parser.parse_args(arguments).quick
    size, rounds = (8, 1) if quick else (400, 3)
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > 4e9
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as place:
        # Pieces of 32 MiB have no place in a file of 8 MB.
        transfer.PIECE = min(transfer.PIECE, size * 1_000_000 // 10)
        rows = bench_downloads(Path(place), size, rounds)
        shutil.rmtree(place)
        rows += bench_verify(Path(place), 4, size, rounds)
    rates = {(row["what"], row["who"]): row["rate"] for row in rows}

    def ratio(what: str, one: str, other: str) -> float:
        return rates[what, one] / rates[what, other]

    one, four = "llamalab, 1 connection", "llamalab, 4 connections"
    per_connection = "throttled to 25 MB/s per connection"
    ratios = {
        "throttled, ours / curl": ratio("server throttled to 100 MB/s", one, "curl"),
        "4 connections / 1": ratio(per_connection, four, one),
        "unthrottled, ours / hashing": ratio("not throttled", one, "md5 and sha256 of the file"),
        "unthrottled, ours / curl": ratio("not throttled", one, "curl, which checks nothing"),
        "verify / md5sum": ratio("4 files, md5", "llamalab verify", "md5sum --check"),
        "verify / sha256sum": ratio("4 files, sha256", "llamalab verify", "sha256sum --check"),
        "verify / reading": ratio("4 files, sha256", "llamalab verify", "cat"),
    }
    for row in rows:
        print(f"{row['what']:37} {row['who']:28} {row['rate']:8.0f} MB/s")
    print()
    for name, value in ratios.items():
        print(f"{name:37} {value:.2f}")
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "in_memory": roomy}
    result = {"rows": rows, "ratios": ratios, "machine": machine, "megabytes": size}
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
