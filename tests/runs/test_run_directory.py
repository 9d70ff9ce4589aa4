"""The directory of one run: whole under its name, or not there."""

from __future__ import annotations

import shutil

import pytest

from books import notebook
from llamalab_runs import run_directory
from llamalab_runs.notebooks import read_notebook
from llamalab_runs.run_directory import Job, Run, Status


def test_what_was_abandoned_cannot_become_a_run(tmp_path, monkeypatch):
    book = read_notebook(notebook(tmp_path / "n.ipynb", "print(1)"))
    run = Run("n.ipynb", {}, tmp_path / "runs" / "a", Status.OK)
    partial = run_directory.partial_directory(run.directory)
    partial.mkdir(parents=True)
    (partial / "journal").write_text("begun")
    remove, there = shutil.rmtree, []

    def rmtree(path, **how):  # takes a while, in which the writer may be at work
        there.append(partial.exists())
        remove(path, **how)

    monkeypatch.setattr(run_directory.shutil, "rmtree", rmtree)
    run_directory.abandon(run.directory)
    assert there == [False]
    with pytest.raises(FileNotFoundError):  # the writer, who does not know
        run_directory.write_run(run, book.node, book.digest)
    assert list((tmp_path / "runs").iterdir()) == []
    run_directory.abandon(run.directory)  # nothing is there to remove


def test_a_whole_run_is_not_abandoned(tmp_path):
    book = read_notebook(notebook(tmp_path / "n.ipynb", "print(1)"))
    job = Job(book, {"seed": 2}, tmp_path / "runs" / "a")
    run = run_directory.write_unrun(job, Status.KILLED, "somebody did it")
    run_directory.abandon(run.directory)
    assert run_directory.read_run(run.directory) == run
    assert (run.status, run.error) == ("killed", "somebody did it")
    assert {cell["status"] for cell in run.cells} == {"not run"}
    assert book == read_notebook(book.path)
