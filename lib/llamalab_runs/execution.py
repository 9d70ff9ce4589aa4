"""One notebook, truthfully: papermill, a witness in the kernel, and a watch on its process.

A run's directory holds the executed notebook, its HTML, which needs no network, and
`manifest.json`. It appears whole, under its name, or not at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import nbformat

from .kernel_journal import ASK
from .kernel_monitor import KernelMonitor, kill_group
from .run_directory import Run, notebook_digest, partial_directory, write_run
from .verdict import decide, read_journal

NUDGE_SECONDS = 20.0


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
    watch, journal = KernelMonitor(memory_limit, tell), partial / "journal"
    source, began = notebook_digest(notebook), time.monotonic()
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
    decide(run, watch, read_journal(journal))
    write_run(run, watch.notebook, source)
    return run


def _papermill(
    watch: KernelMonitor, parameters: dict, folder: Path, journal: Path, timeout
) -> None:
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
                    "--IPKernelApp.extra_extensions=llamalab_runs.kernel_journal",
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
