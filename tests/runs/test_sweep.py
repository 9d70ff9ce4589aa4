"""Sweeps: every point once, whatever is killed, and one summary that says what happened."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from books import notebook
from llamalab.errors import OutputExists, UsageError
from llamalab_runs import run_directory, runner, sweep
from llamalab_runs.kernel_journal import RESULTS

pytestmark = pytest.mark.slow

RECORD = (
    "from IPython.display import display\n"
    f"display({{'{RESULTS}': {{'square': seed ** 2, 'in': {{'heat': heat}}, 'text': '<b>&' + name}},"
    " 'text/plain': ''}, raw=True)"
)
WHOLE = {"sweep.json", "points", "summary.csv", "index.html", ".lock"}


def point_book(tmp_path: Path, *cells: str) -> Path:
    """A notebook that writes into `log` which point began and which has ended."""
    log = str(tmp_path / "log")
    return notebook(
        tmp_path / "n.ipynb",
        f"open({log!r}, 'a').write(f'began {{seed}} {{heat}}\\n')\nimport time; time.sleep(0.3)",
        *cells,
        RECORD,
        f"open({log!r}, 'a').write(f'ended {{seed}} {{heat}}\\n')",
    )


def command(path: Path, *more: str) -> list[str]:
    program = [sys.executable, "-W", "ignore", "-m", "llamalab", "run", str(path)]
    return [*program, "--output-dir", str(path.parent / "runs"), *more]


def read_csv(directory: Path) -> list[dict]:
    with open(directory / "summary.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def count(tmp_path: Path, word: str) -> dict[str, int]:
    lines = (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []
    told = [line.removeprefix(word + " ") for line in lines if line.startswith(word)]
    return {point: told.count(point) for point in told}


def descendants(front: subprocess.Popen) -> tuple[list, list, list]:
    """Return the server of processes, the processes that run a notebook, and the kernels."""
    lines = {}
    for process in psutil.Process(front.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            lines[process] = (process.parent(), " ".join(process.cmdline()))
    kernels = [p for p, (_, line) in lines.items() if "ipykernel" in line]
    parents = {p: parent for p, (parent, line) in lines.items() if "forkserver" in line}
    running = [p for p, parent in parents.items() if parent in parents]
    return [p for p in parents if p not in running], running, kernels


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_the_grid_its_order_and_its_summary(tmp_path):
    path = point_book(tmp_path, "if seed == 2 and heat == 0.5: raise ValueError('bad <point>')")
    swept = sweep.prepare(path, {"seed": ["1", "2"], "heat": [0.5, 1]}, {"name": "$x_1$"}, tmp_path)
    assert swept.points == [
        {"name": "$x_1$", "seed": s, "heat": h} for s in (1, 2) for h in (0.5, 1.0)
    ]
    runs = sweep.run_sweep(swept, jobs=2)
    assert [run.status for run in runs] == ["ok", "ok", "failed", "ok"]
    rows = read_csv(swept.directory)
    assert [(r["point"], r["seed"], r["heat"]) for r in rows] == [
        ("0", "1", "0.5"), ("1", "1", "1.0"), ("2", "2", "0.5"), ("3", "2", "1.0"),
    ]  # fmt: skip
    assert [r["result.square"] for r in rows] == ["1", "1", "", "4"]
    assert rows[3]["result.in.heat"] == "1.0" and rows[2]["error"] == "ValueError: bad <point>"
    text = swept.index.read_text("utf-8")
    assert text.count("<svg") == 2 and "bad &lt;point&gt;" in text and "<b>&" not in text
    assert "&lt;b&gt;&amp;$x_1$" in text
    links = re.findall(r'(?:src|href)="(?!data:)([^"#]+)"', text)
    assert len(links) == 5 and all((swept.directory / link).is_file() for link in links)
    assert {p.name for p in swept.directory.iterdir()} == WHOLE
    # Once more: what failed is run again, what ended ok is not.
    began = count(tmp_path, "began")
    again = sweep.prepare(path, {"seed": [1, 2], "heat": [0.5, 1.0]}, {"name": "$x_1$"}, tmp_path)
    assert again.directory == swept.directory
    sweep.run_sweep(again)
    assert count(tmp_path, "began") == began | {"2 0.5": 2}
    # Another text of the notebook is another sweep.
    point_book(tmp_path)
    other = sweep.prepare(path, {"seed": [1, 2], "heat": [0.5, 1.0]}, {"name": "$x_1$"}, tmp_path)
    assert other.directory != swept.directory


def test_24_points_survive_kills_of_front_and_workers(tmp_path):
    path = point_book(tmp_path)
    grid = ["--sweep", "seed=1,2,3,4,5,6", "--sweep", "heat=0.1,0.2,0.3,0.4", "--jobs", "2"]

    def ended() -> set[Path]:
        return {p.parent for p in (tmp_path / "runs").glob("*/points/*/manifest.json")}

    def kill_one(kind: int) -> bool:
        """Kill a worker (0) or a process that runs a notebook (1), if there is one now."""
        for process in descendants(front)[kind]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return True
        return False

    front = subprocess.Popen(command(path, *grid), stderr=subprocess.DEVNULL)
    wait_until(lambda: len(ended()) >= 3 and kill_one(1))
    wait_until(lambda: len(ended()) >= 6 and kill_one(0))  # it had papermill ready
    wait_until(lambda: len(ended()) >= 9)
    left = sum(descendants(front), [])  # a worker waits for what it runs, and removes its pieces
    front.kill()
    front.wait()
    psutil.wait_procs(left, timeout=30)
    assert not any(p.is_running() and p.status() != "zombie" for p in left)
    kept = {directory: directory.stat().st_ino for directory in ended()}
    assert 9 <= len(kept) < 24
    (directory,) = (tmp_path / "runs").glob("*-n-*")
    assert not list((directory / "points").glob(".*")) and not (directory / "index.html").exists()

    done = subprocess.run(command(path, *grid), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{len(kept)} of 24 points had ended before and are kept" in done.stderr
    assert {d: d.stat().st_ino for d in kept} == kept  # not run again
    rows = read_csv(directory)
    assert [int(row["point"]) for row in rows] == list(range(24))
    assert {row["status"] for row in rows} == {"ok"}
    assert all(float(row["result.square"]) == int(row["seed"]) ** 2 for row in rows)
    # Only what was cut off ran more than once: one or two by each kill of a worker, two by the front's.
    assert len(count(tmp_path, "ended")) == 24 and sum(count(tmp_path, "began").values()) <= 24 + 6
    assert {p.name for p in directory.iterdir()} == WHOLE


def test_ctrl_c_keeps_what_has_ended_and_leaves_nothing_half_written(tmp_path):
    path = point_book(tmp_path)
    grid = ["--sweep", "seed=1,2,3,4", "--jobs", "2"]
    front = subprocess.Popen(command(path, *grid), stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list((tmp_path / "runs").glob("*/points/[0-9]")) and descendants(front)[2])
    _, running, kernels = descendants(front)
    front.send_signal(signal.SIGINT)
    assert front.wait(timeout=30) == 130
    # A kernel that was just starting looks once a second whether its parent is there.
    psutil.wait_procs(running + kernels, timeout=10)
    assert not any(p.is_running() and p.status() != "zombie" for p in running + kernels)
    text = front.stderr.read()
    assert "goes on from there" in text and "Traceback" not in text
    (directory,) = (tmp_path / "runs").glob("*-n-*")
    left = list((directory / "points").iterdir())
    assert left and all((place / "manifest.json").is_file() for place in left)
    assert subprocess.run(command(path, *grid), stderr=subprocess.DEVNULL).returncode == 0
    assert len(read_csv(directory)) == 4


def test_a_process_killed_again_and_again_is_called_killed(tmp_path):
    path = notebook(
        tmp_path / "n.ipynb",
        "import os, signal\nif seed == 2: os.kill(os.getppid(), signal.SIGKILL)",
        "import time; time.sleep(0.1)",
    )
    swept = sweep.prepare(path, {"seed": [1, 2, 3]}, {}, tmp_path / "runs")
    runs = sweep.run_sweep(swept)
    assert [run.status for run in runs] == ["ok", "killed", "ok"]
    assert "was killed, 2 times" in runs[1].error and runs[1].report.is_file()
    assert {cell["status"] for cell in runs[1].cells} == {"not run"}
    assert "killed" in (runs[1].directory / "n.ipynb").read_text()


def test_what_does_not_fit_is_refused_before_anything_runs(tmp_path):
    path = point_book(tmp_path)
    for grid, words in (
        ({"sede": [1]}, "Did you mean seed"),
        ({"seed": [1, "x"]}, "wants int"),
        ({"seed": ["1", 1]}, "given twice"),
        ({"name": ["y"]}, "both swept and given"),
    ):
        with pytest.raises(UsageError, match=words):
            sweep.prepare(path, grid, {"name": "x"}, tmp_path / "runs")
    done = subprocess.run(command(path, "--sweep", "seed"), capture_output=True, text=True)
    assert done.returncode == 2 and "is not NAME=V1,V2" in done.stderr
    done = subprocess.run(
        command(path, "--sweep", "name=['a,b', c]", "--prepare-only"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "2 points" in done.stdout and "'a,b'" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_two_fronts_do_not_run_one_sweep(tmp_path):
    swept = sweep.prepare(point_book(tmp_path), {"seed": [1]}, {}, tmp_path / "runs")
    with sweep._alone(swept), pytest.raises(OutputExists, match="Another process"):
        sweep.run_sweep(swept)


def test_cores_and_memory_limit_the_jobs(tmp_path, monkeypatch):
    swept = sweep.prepare(point_book(tmp_path), {"seed": [1, 2]}, {}, tmp_path / "runs")
    monkeypatch.setattr(sweep, "cores", lambda: 8)
    monkeypatch.setattr(sweep.environment, "memory_available", lambda: 10**10)
    assert sweep.fitting_jobs(swept, 5) == 5
    assert sweep.fitting_jobs(swept, 9) == 8
    assert sweep.fitting_jobs(swept, 9, memory_limit=3 * 10**9) == 3
    assert sweep.fitting_jobs(swept, 9, memory_limit=3 * 10**10) == 1


def test_the_index_of_all_runs_and_keeping_the_newest(tmp_path):
    from llamalab.cli import main
    from llamalab_runs import run_index

    good, bad = point_book(tmp_path), notebook(tmp_path / "bad <i>.ipynb", "1 / 0")
    out = tmp_path / "runs"
    mine = out / "20200101T000000Z-n-abcdef"
    mine.mkdir(parents=True)  # named like a run, and none
    (mine / "notes").write_text("mine")
    for path in (good, bad, good, good):
        began = time.monotonic()
        code = main(["run", str(path), "--output-dir", str(out)])
        assert code == (1 if path is bad else 0)
        time.sleep(max(0, began + 1 - time.monotonic()))  # names differ by the second
    text = (out / "index.html").read_text("utf-8")
    assert text.count("<tr") == 5 and "ZeroDivisionError" in text and "<i>" not in text
    assert len(re.findall(r"<td>[\d.]+ MB</td>", text)) == 4  # the peaks of memory
    from urllib.parse import unquote

    links = [unquote(link) for link in re.findall(r'href="([^"]+)"', text)]
    assert len(links) == 4 and all((out / link).is_file() for link in links)
    before = run_index.runs_in(out)
    arguments = ["run", str(good), "--output-dir", str(out), "--sweep", "seed=5", "--keep", "2"]
    assert main(arguments) == 0
    after = run_index.runs_in(out)
    assert len(after) == 3 and {p for p in before if "bad" in p.name} < set(after)
    assert len([p for p in after if p in before]) == 2 and (mine / "notes").exists()
    assert (out / "index.html").read_text("utf-8").count("<tr") == 4
    assert run_directory.read_run(mine) is None and os.listdir(mine) == ["notes"]
    assert json.loads((after[0] / "sweep.json").read_text())["swept"] == {"seed": [5]}
    assert runner.plan([good], {})
