"""Processes that run notebooks: what they inherit, and that they begin with nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from books import notebook
from llamalab_runs.notebooks import read_notebook
from llamalab_runs.run_directory import Job, partial_directory, read_run
from llamalab_runs.worker import run_jobs

pytestmark = pytest.mark.slow

SHOW = (
    "import os\nfrom IPython.display import display\n"
    "found = {n: os.environ.get(n) for n in ('OMP_NUM_THREADS', 'OF_NOW')}\n"
    "display({'application/vnd.llamalab.results+json': found | {'here': os.getcwd()}}, raw=True)"
)


def test_jobs_get_the_environment_of_now_and_their_share_of_threads(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    book = read_notebook(notebook(tmp_path / "n.ipynb", SHOW))

    def found(name: str, **how) -> list[dict]:
        jobs = [Job(book, {}, tmp_path / f"{name}-{i}") for i in range(how.get("at_once", 1))]
        return [run.results for _, run in run_jobs(jobs, **how)]

    ours = {"OMP_NUM_THREADS": None, "OF_NOW": None, "here": str(tmp_path)}
    assert found("one") == [ours]
    monkeypatch.setenv("OF_NOW", "1")  # the server of processes is there already
    assert found("two", at_once=2, threads=3) == 2 * [
        ours | {"OF_NOW": "1", "OMP_NUM_THREADS": "3"}
    ]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the reader's own choice
    assert found("own", threads=3)[0]["OMP_NUM_THREADS"] == "5"
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_a_program_without_a_guard_is_not_run_again_in_its_processes(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "print(1)")
    program = tmp_path / "program.py"
    program.write_text(
        "import llamalab_runs\nprint('begun')\n"
        f"print(llamalab_runs.run([{str(path)!r}], output_dir={str(tmp_path)!r})[0].status)\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert done.stdout.split() == ["begun", "ok"], done.stderr
    assert done.stderr == ""


def test_what_goes_wrong_in_our_own_program_is_said_in_the_run(tmp_path):
    book = read_notebook(notebook(tmp_path / "n.ipynb", "print(1)"))
    job = Job(book, {}, tmp_path / "run")
    partial_directory(job.directory).mkdir()  # another one's, as it seems
    ((_, run),) = run_jobs([job])
    assert (run.status, run.error.split(":")[0]) == ("failed", "FileExistsError")
    assert read_run(job.directory) == run and not partial_directory(job.directory).exists()
