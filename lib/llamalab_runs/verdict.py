"""What became of a run: from cells, the kernel's journal and papermill's end to one status."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from nbformat import NotebookNode, v4

from .kernel_journal import RESULTS
from .kernel_monitor import KernelMonitor
from .run_directory import BANNER, Run


def read_journal(journal: Path) -> list[dict]:
    told = []
    # A kernel that is killed while it writes leaves half a line, which is the last one.
    with contextlib.suppress(OSError, ValueError):
        for line in journal.read_text(encoding="utf-8").splitlines():
            told.append(json.loads(line))
    return told


def decide(run: Run, watch: KernelMonitor, told: list[dict]) -> None:
    """Decide what happened from all there is, and write it into the notebook and the run."""
    cells = watch.notebook.cells
    cells[:] = [cell for cell in cells if BANNER not in cell.metadata.get("tags", [])]
    code = [i for i, cell in enumerate(cells) if cell.cell_type == "code"]
    status = {i: _cell_status(cells[i]) for i in code}
    if run.status in ("killed", "timeout") and watch.cell in status:
        cell, status[watch.cell] = cells[watch.cell], run.status
        # A kernel that dies at once does not even say that the cell has begun.
        began = [i for i in code if i <= watch.cell and cells[i].source.strip()]
        cell.execution_count = cell.execution_count or len(began)
        text = run.error = f"In cell [{cell.execution_count}]: {run.error}"
        shown = {"ename": run.status, "evalue": run.error, "traceback": [text]}
        cell.outputs.append(v4.new_output("error", **shown))
    for event in told[1:]:
        ran = [i for i in code if 0 < (cells[i].execution_count or 0) <= event["cell"]]
        for culprit in ran[-1:]:
            status[culprit] = "failed" if status[culprit] == "ok" else status[culprit]
            shown = {key: event[key] for key in ("ename", "evalue", "traceback")}
            cells[culprit].outputs.append(v4.new_output("error", **shown))
        if run.status == "ok":
            run.error = f"{event['ename']}: {event['evalue']} (hidden in {event['kind']})"
            run.status = "failed"
    if run.status == "ok" and set(status.values()) - {"ok"}:
        run.status = "failed"
        failed = [cells[i] for i in code if status[i] == "failed"]
        errors = [o for cell in failed for o in cell.outputs if o.output_type == "error"]
        run.error = "Not every cell has run."
        if errors and errors[0].ename == "SystemExit":
            run.error = f"SystemExit({errors[0].evalue}) ended the notebook early."
        elif errors:
            run.error = f"{errors[0].ename}: {errors[0].evalue}"
    elif run.status == "ok" and not told:
        run.status = "failed"
        run.error = "The kernel ran unwatched: llamalab is not installed there."
    for i in code:
        _tell_papermill(cells[i], status[i])
        run.cells.append(
            {
                "index": i,
                "status": status[i],
                "seconds": watch.seconds.get(i),
                "peak_rss_bytes": watch.peaks.get(i),
            }
        )
        for output in cells[i].outputs:
            run.results |= output.get("data", {}).get(RESULTS, {})
    run.peak_rss_bytes = max(watch.peaks.values(), default=None)


def _cell_status(cell: NotebookNode) -> str:
    expected = "raises-exception" in cell.metadata.get("tags", [])
    if any(output.output_type == "error" for output in cell.outputs) and not expected:
        return "failed"
    return "ok" if cell.execution_count is not None or not cell.source.strip() else "not run"


def _tell_papermill(cell: NotebookNode, status: str) -> None:
    """Put right what papermill's own metadata says of a cell; it believes that all have ended."""
    told = cell.metadata.setdefault("papermill", {})
    if status == "not run":
        told |= dict(status="pending", start_time=None, end_time=None, duration=None)
    elif status != "ok":
        told |= dict(status="failed", exception=True)
