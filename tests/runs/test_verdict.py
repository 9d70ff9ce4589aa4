"""What became of a run, from evidence made up for it; real runs are in test_execution."""

from __future__ import annotations

from pathlib import Path

import pytest
from nbformat import v4

from llamalab_runs.kernel_monitor import KernelMonitor
from llamalab_runs.run_directory import BANNER, Run, Status
from llamalab_runs.verdict import decide, read_journal

READY = {"kind": "ready"}
HIDDEN = {"kind": "a thread", "cell": 1, "ename": "KeyError", "evalue": "1", "traceback": []}


def judged(counts, journal, status=Status.OK, running=-1):
    """Decide over code cells with these execution counts, of which one was `running`."""
    monitor = KernelMonitor(None, lambda event: None)
    cells = [v4.new_code_cell("1", execution_count=count) for count in counts]
    monitor.notebook, monitor.cell = v4.new_notebook(cells=cells), running
    run = Run("n.ipynb", {}, Path("run"), status, "why" if running >= 0 else "")
    decide(run, monitor, journal)
    return run, monitor.notebook


@pytest.mark.parametrize(
    "counts, journal, status, running, verdict, words, cells",
    [
        ([1, 2], [READY], Status.OK, -1, "ok", "", ["ok", "ok"]),
        ([1, 2], [], Status.OK, -1, "failed", "ran unwatched", ["ok", "ok"]),
        ([1, None], [READY], Status.OK, -1, "failed", "Not every cell", ["ok", "not run"]),
        ([1, 2], [READY, HIDDEN], Status.OK, -1, "failed", "hidden in a thread", ["failed", "ok"]),
        ([1, None], [READY], Status.KILLED, 1, "killed", "In cell [2]: why", ["ok", "killed"]),
        (
            [None, None],
            [],
            Status.TIMEOUT,
            0,
            "timeout",
            "In cell [1]: why",
            ["timeout", "not run"],
        ),
        ([1, None], [READY, HIDDEN], Status.KILLED, 1, "killed", "why", ["failed", "killed"]),
        (
            [1],
            [READY, HIDDEN, HIDDEN | {"evalue": "2"}],
            Status.OK,
            -1,
            "failed",
            ": 1",
            ["failed"],
        ),
    ],
)
def test_the_verdict(counts, journal, status, running, verdict, words, cells):
    run, book = judged(counts, journal, status, running)
    assert (run.status, words in run.error) == (verdict, True), run.error
    assert [cell["status"] for cell in run.cells] == cells
    blamed = {i for i, cell in enumerate(book.cells) if cell.outputs}
    assert blamed == {i for i, state in enumerate(cells) if state not in ("ok", "not run")}


def test_papermills_own_marks_are_taken_out_before_cells_are_counted():
    monitor = KernelMonitor(None, lambda event: None)
    mark = v4.new_markdown_cell("failed!", metadata={"tags": [BANNER]})
    monitor.notebook = v4.new_notebook(cells=[mark, v4.new_code_cell("1", execution_count=1)])
    run = Run("n.ipynb", {}, Path("run"), Status.OK)
    decide(run, monitor, [READY])
    assert [cell["index"] for cell in run.cells] == [0]


def test_a_journal_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "journal").write_text('{"kind": "ready"}\n{"kind": "a thr')
    assert read_journal(tmp_path / "journal") == [READY]
    assert read_journal(tmp_path / "absent") == []
