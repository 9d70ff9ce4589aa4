"""One notebook, truthfully: papermill, a witness in the kernel, and a watch on its process.

A run's directory holds the executed notebook, its HTML, which needs no network, and
`manifest.json`. It appears whole, under its name, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import nbformat
from nbformat import NotebookNode, v4

from . import __version__
from .places import project_directory
from .report import write_report, write_text
from .watch import Watch, kill_group
from .witness import ASK, RESULTS

MANIFEST = "manifest.json"
NUDGE_SECONDS = 20.0
BANNER = "papermill-error-cell-tag"  # papermill takes cells with this tag out of a next run


@dataclass
class Run:
    """One run of one notebook, as `manifest.json` holds it.

    `status` is "ok", "failed", "killed" (the kernel died) or "timeout" (a cell took too long);
    `results` are what the notebook recorded; each of `cells` holds index (in the executed
    notebook), status, seconds and peak_rss_bytes of the kernel's process; `digests` are sha256.
    """

    notebook: str
    parameters: dict
    directory: Path
    status: str = "failed"
    error: str = ""
    seconds: float = 0.0
    peak_rss_bytes: int | None = None
    versions: dict = field(default_factory=dict)
    commit: str | None = None
    cells: list[dict] = field(default_factory=list)
    results: dict = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.directory / f"{Path(self.notebook).stem}.html"


def read_run(directory: Path) -> Run | None:
    """Return the run that a directory holds, or None where there is no whole one."""
    try:
        held = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        return Run(**held | {"directory": directory})
    except (OSError, ValueError, TypeError):
        return None


def partial_directory(directory: Path) -> Path:
    """Return where a run lies until it is whole."""
    return directory.with_name(f".{directory.name}.partial")


def execute(
    notebook: Path,
    directory: Path,
    parameters: dict,
    cell_timeout: int | None = None,
    memory_limit: int | None = None,
    tell: Callable[[dict], None] = lambda event: None,
) -> Run:
    """Run one notebook with parameters that fit; write `directory`; return the `Run`.

    It belongs into a process of its own: papermill changes the working directory.
    """
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    partial = partial_directory(directory)
    partial.mkdir(parents=True)
    run = Run(notebook.name, parameters, directory)
    watch, journal = Watch(memory_limit, tell), partial / "journal"
    source, began = digest(notebook), time.monotonic()
    watch.notebook = nbformat.read(notebook, as_version=4)
    try:
        _papermill(watch, parameters, notebook.parent, journal, cell_timeout)
        run.status = "ok"
    except DeadKernelError:
        run.status = "killed"
    except CellTimeoutError:
        run.status, run.error = "timeout", "its output did not arrive."
        if cell_timeout:
            run.error = f"it ran longer than {cell_timeout} s."
    except RuntimeError as error:  # the kernel did not start
        run.error = str(error)
    finally:
        watch.stop()
    run.seconds = round(time.monotonic() - began, 3)
    if run.status == "killed":
        run.error = watch.cause_of_death()
    _judge(run, watch, _read_journal(journal))
    write_run(run, watch.notebook, source)
    return run


def _papermill(watch: Watch, parameters: dict, folder: Path, journal: Path, timeout) -> None:
    import papermill
    from nbclient.util import run_sync
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines

    class Client(PapermillNotebookClient):
        def papermill_execute_cells(self):
            process = self.km.provisioner.process
            watch.start(process.pid)
            try:
                super().papermill_execute_cells()
                asked = self.kc.execute(ASK, silent=True, store_history=False)
                self.wait_for_reply(asked, (self.nb.cells or [None])[-1])
            except Exception:
                kill_group(process.pid)  # a kernel that hangs would not leave when asked to
                watch.exit_code = process.wait()
                raise

        async def async_execute_cell(self, cell, index, **options):
            if cell.cell_type != "code" or not cell.source.strip():
                return cell
            watch.begin(index)
            nudge = asyncio.ensure_future(self._nudge())
            try:
                return await super().async_execute_cell(cell, index, **options)
            finally:
                nudge.cancel()
                watch.end()

        execute_cell = run_sync(async_execute_cell)  # what papermill calls, bound as in nbclient

        async def _nudge(self):
            """Ask the kernel something now and then, so that a reply that came is noticed.

            nbclient sends what widgets say on the socket on which it waits for the cell's reply,
            past asyncio: a reply that arrives just then lies there unseen until the next one.
            """
            while True:
                await asyncio.sleep(NUDGE_SECONDS)
                self.kc.kernel_info()

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **options):
            watch.notebook = nb_man.nb
            Client(
                nb_man,
                kernel_name=kernel_name,
                timeout=timeout,
                iopub_timeout=300,  # large outputs arrive long after their cell has ended
                extra_arguments=[
                    "--IPKernelApp.log_level=CRITICAL",  # it tells of loopback, and of our end
                    "--IPKernelApp.extra_extensions=llamalab.witness",
                    f"--Witness.journal={journal}",
                ],
            ).execute()

    papermill_engines.register("llamalab", Engine)
    # An error in a cell is found again, with all others, in the executed notebook.
    with contextlib.suppress(papermill.PapermillExecutionError):
        papermill.execute_notebook(
            watch.notebook,
            None,
            parameters,
            engine_name="llamalab",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            autosave_cell_every=0,
            cwd=str(folder),
        )


def _read_journal(journal: Path) -> list[dict]:
    told = []
    # A kernel that is killed while it writes leaves half a line, which is the last one.
    with contextlib.suppress(OSError, ValueError):
        for line in journal.read_text(encoding="utf-8").splitlines():
            told.append(json.loads(line))
    return told


def _judge(run: Run, watch: Watch, told: list[dict]) -> None:
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


def write_run(run: Run, notebook: NotebookNode, source_digest: str) -> None:
    """Write a run's directory: notebook, report, manifest; then give it its name."""
    partial = partial_directory(run.directory)
    partial.mkdir(parents=True, exist_ok=True)
    run.versions, run.commit = _versions(), _commit()
    told = notebook.metadata.setdefault("papermill", {})
    told |= {"input_path": run.notebook, "output_path": run.notebook}
    told |= {"exception": run.status != "ok"}
    notebook.metadata["llamalab"] = {"status": run.status, "error": run.error}
    if run.status != "ok":
        text = "".join(f"    {line}\n" for line in (run.error or "failed").splitlines())
        banner = v4.new_markdown_cell(f"**This run: {run.status}**\n\n{text}")
        banner.metadata["tags"] = [BANNER]
        notebook.cells.insert(0, banner)
        for cell in run.cells:
            cell["index"] += 1
    executed, report = partial / run.notebook, partial / run.report.name
    write_text(executed, nbformat.writes(notebook))
    write_report(notebook, report)
    run.digests = {"source": source_digest}
    for name, file in (("executed", executed), ("report", report)):
        run.digests[name] = digest(file)
    write_text(partial / MANIFEST, as_json(run))
    (partial / "journal").unlink(missing_ok=True)
    os.replace(partial, run.directory)


def write_unrun(run: Run, source: Path) -> None:
    """Write the directory of a run that nobody is left to tell of: no cell of `source` has run."""
    notebook = nbformat.read(source, as_version=4)
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            unknown = {"status": "not run", "seconds": None, "peak_rss_bytes": None}
            run.cells.append({"index": index} | unknown)
    write_run(run, notebook, digest(source))


def as_json(run: Run) -> str:
    """Return the text of a manifest."""
    held = asdict(run) | {"directory": str(run.directory)}
    return json.dumps(held, indent=2, ensure_ascii=False) + "\n"


def digest(file: Path) -> str:
    """Return the sha256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "papermill", "nbclient")
    found = {name: version(name) for name in names}
    return {"llamalab": __version__, "python": platform.python_version()} | found


def _commit() -> str | None:
    """Return the checkout's commit, or None outside a checkout."""
    command = ["git", "-C", str(project_directory()), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
