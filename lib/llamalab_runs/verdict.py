"""What became of a run: from cells, the kernel's journal and papermill's end to one status."""

import contextlib
import json
from pathlib import Path

from nbformat import NotebookNode, v4

from .kernel_journal import RESULTS
from .kernel_monitor import KernelMonitor
from .run_directory import BANNER, Run, Status

Cells = dict[int, NotebookNode]
"""Code cells by their index in the notebook."""


def read_journal(journal: Path) -> list[dict]:
    """Return the lines of a kernel's journal; the first says only that the kernel kept one."""
    lines = []
    # A kernel that is killed while it writes leaves half a line, which is the last one.
    with contextlib.suppress(OSError, ValueError):
        for line in journal.read_text(encoding="utf-8").splitlines():
            lines.append(json.loads(line))
    return lines


def decide(run: Run, monitor: KernelMonitor, journal: list[dict]) -> None:
    """Decide what happened from all there is, and write it into the notebook and the run.

    Args:
        run: with the status and the error that papermill's end alone suggests.
    """
    cells = monitor.notebook.cells
    cells[:] = [cell for cell in cells if BANNER not in cell.metadata.get("tags", [])]
    code = {i: cell for i, cell in enumerate(cells) if cell.cell_type == "code"}
    status = {i: _status_of(cell) for i, cell in code.items()}
    if run.status in (Status.KILLED, Status.TIMEOUT) and monitor.cell in code:
        _blame_running_cell(run, code, monitor.cell)
        status[monitor.cell] = run.status
    for event in journal[1:]:
        _blame_hidden_error(run, code, status, event)
    if run.status == Status.OK:
        run.error = _what_failed(code, status, journal)
        run.status = Status.FAILED if run.error else Status.OK
    for i, cell in code.items():
        _correct_papermill(cell, status[i])
        measured = {"seconds": monitor.seconds.get(i), "peak_rss_bytes": monitor.peaks.get(i)}
        run.cells.append({"index": i, "status": status[i]} | measured)
        for output in cell.outputs:
            run.results |= output.get("data", {}).get(RESULTS, {})
    run.peak_rss_bytes = max(monitor.peaks.values(), default=None)


def _status_of(cell: NotebookNode) -> Status:
    expected = "raises-exception" in cell.metadata.get("tags", [])
    if any(output.output_type == "error" for output in cell.outputs) and not expected:
        return Status.FAILED
    ran = cell.execution_count is not None or not cell.source.strip()
    return Status.OK if ran else Status.NOT_RUN


def _blame_running_cell(run: Run, code: Cells, running: int) -> None:
    """Show in the cell that ran when the kernel ended, or was ended, that it did."""
    cell = code[running]
    # A kernel that dies at once does not even say that the cell has begun.
    begun = [i for i in code if i <= running and code[i].source.strip()]
    cell.execution_count = cell.execution_count or len(begun)
    run.error = f"In cell [{cell.execution_count}]: {run.error}"
    _show_error(cell, ename=run.status, evalue=run.error, traceback=[run.error])


def _blame_hidden_error(run: Run, code: Cells, status: dict[int, Status], event: dict) -> None:
    """Show an error of the journal in the last cell that had begun when it happened."""
    begun = [i for i in code if 0 < (code[i].execution_count or 0) <= event["cell"]]
    for culprit in begun[-1:]:
        if status[culprit] == Status.OK:
            status[culprit] = Status.FAILED
        shown = {key: event[key] for key in ("ename", "evalue", "traceback")}
        _show_error(code[culprit], **shown)
    if run.status == Status.OK:
        run.status = Status.FAILED
        run.error = f"{event['ename']}: {event['evalue']} (hidden in {event['kind']})"


def _show_error(cell: NotebookNode, **error) -> None:
    cell.outputs.append(v4.new_output("error", **error))


def _what_failed(code: Cells, status: dict[int, Status], journal: list[dict]) -> str:
    """Return what is wrong with a run that seems to have ended well, or nothing."""
    failed = [code[i] for i in code if status[i] == Status.FAILED]
    errors = [output for cell in failed for output in cell.outputs if output.output_type == "error"]
    if errors and errors[0].ename == "SystemExit":
        return f"SystemExit({errors[0].evalue}) ended the notebook early."
    if errors:
        return f"{errors[0].ename}: {errors[0].evalue}"
    if Status.NOT_RUN in status.values():
        return "Not every cell has run."
    return "" if journal else "The kernel ran unwatched: llamalab is not installed there."


def _correct_papermill(cell: NotebookNode, status: Status) -> None:
    """Put right what papermill's own metadata says of a cell; it believes that all have ended."""
    about = cell.metadata.setdefault("papermill", {})
    if status == Status.NOT_RUN:
        about |= dict(status="pending", start_time=None, end_time=None, duration=None)
    elif status != Status.OK:
        about |= dict(status="failed", exception=True)
