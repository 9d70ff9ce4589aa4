"""What does `llamalab run` cost beside bare papermill, and what do two jobs gain?

    python benchmarks/run.py [--points 12] [--rounds 3]

One notebook that computes for a second on one core is run at several points: by the command
`papermill`, once a point; by a sweep with one job; by a sweep with two. Contenders take turns; a
figure is the median of the rounds. The sweep's times include Python's start and its summary. A table
comes first, then one line of JSON. Targets: at most 0.5 s a point over papermill; with two jobs
at least 1.6 times as many points in a time, on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbformat import v4

# A fixed time of computing, not a fixed amount: other programs on the machine change it less.
WORK = "import time\nend = time.thread_time() + 1\nwhile time.thread_time() < end: pass"


def write_notebook(path: Path) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    book = v4.new_notebook(metadata={"kernelspec": kernel})
    parameters = v4.new_code_cell("seed: int = 1", metadata={"tags": ["parameters"]})
    book.cells = [parameters, v4.new_code_cell(WORK), v4.new_code_cell("print(seed)")]
    nbformat.write(book, path)
    return path


def papermill(notebook: Path, points: int, folder: Path) -> None:
    for seed in range(points):
        arguments = [str(notebook), str(folder / f"{seed}.ipynb"), "-p", "seed", str(seed)]
        _command("papermill", *arguments, "--no-progress-bar")


def sweep(notebook: Path, points: int, folder: Path, jobs: int) -> None:
    seeds = ",".join(map(str, range(points)))
    arguments = [str(notebook), "--sweep", f"seed={seeds}", "--output-dir", str(folder)]
    _command("llamalab", "run", *arguments, "--jobs", str(jobs))


def _command(module: str, *arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    contenders = {
        "papermill": papermill,
        "one job": lambda *where: sweep(*where, jobs=1),
        "two jobs": lambda *where: sweep(*where, jobs=2),
    }
    times = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        notebook = write_notebook(Path(folder) / "work.ipynb")
        for number in range(options.rounds):
            for name, contender in contenders.items():
                place = Path(folder) / f"{name}-{number}"
                place.mkdir()
                began = time.perf_counter()
                contender(notebook, options.points, place)
                times[name].append(time.perf_counter() - began)
                print(f"round {number}: {name} {times[name][-1]:.1f} s", file=sys.stderr)
    each = {name: statistics.median(t) / options.points for name, t in times.items()}
    extra = each["one job"] - each["papermill"]
    # Both of one round stood under the same load.
    pairs = zip(times["one job"], times["two jobs"], strict=True)
    gain = statistics.median(one / two for one, two in pairs)
    for name, seconds in each.items():
        print(f"{name:10} {seconds:6.2f} s a point")
    print(f"over papermill {extra:+.2f} s a point (target: at most 0.5)")
    print(f"two jobs over one {gain:.2f} x (target: at least 1.6)")
    machine = {"machine": platform.machine(), "cores": os.cpu_count()}
    machine["load"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    print(json.dumps({"points": options.points, "seconds": times} | machine))


if __name__ == "__main__":
    main()
