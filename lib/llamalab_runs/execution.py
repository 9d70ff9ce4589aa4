"""One notebook, truthfully: papermill, a journal in the kernel, and a watch on its process."""

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable

import papermill
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from . import kernel_journal
from .kernel_monitor import KernelMonitor, kill_group
from .run_directory import Job, Run, Status, partial_directory, write_run
from .verdict import decide, read_journal

NUDGE_SECONDS = 20.0


class WatchedClient(PapermillNotebookClient):
    """papermill's client: says which cell runs, and ends a kernel that fails to answer."""

    def __init__(self, nb_man, monitor: KernelMonitor, **settings):
        hooks = {"on_cell_execute": self._begin, "on_cell_executed": self._end}
        super().__init__(nb_man, **hooks, **settings)
        self._monitor, self._nudging = monitor, None
        monitor.notebook = self.nb

    def papermill_execute_cells(self) -> None:
        process = self.km.provisioner.process
        self._monitor.start(process.pid)
        try:
            super().papermill_execute_cells()
            settling = self.kc.execute(kernel_journal.SETTLE, silent=True, store_history=False)
            self.wait_for_reply(settling, (self.nb.cells or [None])[-1])
        except Exception:
            self._end()
            kill_group(process.pid)  # a kernel that hangs would not leave when asked to
            self._monitor.exit_code = process.wait()
            raise

    def _begin(self, cell_index: int, **_) -> None:
        self._monitor.begin(cell_index)
        self._nudging = asyncio.ensure_future(self._nudge())

    def _end(self, **_) -> None:
        if self._nudging:
            self._nudging.cancel()
            self._nudging = None
            self._monitor.end()

    async def _nudge(self) -> None:
        """Ask the kernel something now and then, so that a reply that came is noticed.

        nbclient sends what widgets say on the socket on which it waits for the cell's reply,
        past asyncio: a reply that arrives just then lies there unseen until the next one.
        """
        while True:
            await asyncio.sleep(NUDGE_SECONDS)
            self.kc.kernel_info()


class WatchedEngine(NBClientEngine):
    """papermill's engine, with a client of ours."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, client, **_):
        client(nb_man, kernel_name=kernel_name).execute()


papermill_engines.register("llamalab", WatchedEngine)


def execute(job: Job, on_event: Callable[[dict], None] = lambda event: None) -> Run:
    """Run a notebook in its partial directory, which is there; give that its name; return the run.

    It belongs into a process of its own: papermill changes the working directory.

    Args:
        on_event: as `KernelMonitor` calls it.
    """
    run = Run(job.notebook.path.name, job.parameters, job.directory)
    monitor = KernelMonitor(job.memory_limit, on_event)
    journal = partial_directory(job.directory) / "journal"
    began = time.monotonic()
    try:
        _papermill(job, monitor, str(journal))
        run.status = Status.OK
    except DeadKernelError:
        run.status, run.error = Status.KILLED, monitor.cause_of_death()
    except CellTimeoutError:
        run.status, run.error = Status.TIMEOUT, "its output did not arrive."
        if job.cell_timeout:
            run.error = f"it ran longer than {job.cell_timeout} s."
    except RuntimeError as error:  # the kernel did not start
        run.error = str(error)
    finally:
        monitor.stop()
    run.seconds = round(time.monotonic() - began, 3)
    decide(run, monitor, read_journal(journal))
    write_run(run, monitor.notebook, job.notebook.digest)
    return run


def _papermill(job: Job, monitor: KernelMonitor, journal: str) -> None:
    quiet = "--IPKernelApp.log_level=CRITICAL"  # it tells of loopback, and of our end
    client = functools.partial(
        WatchedClient,
        monitor=monitor,
        timeout=job.cell_timeout,
        iopub_timeout=300,  # large outputs arrive long after their cell has ended
        extra_arguments=[quiet, *kernel_journal.options(journal)],
    )
    # An error in a cell is found again, with all others, in the executed notebook.
    with contextlib.suppress(papermill.PapermillExecutionError):
        papermill.execute_notebook(
            job.notebook.node,  # of which papermill makes a copy
            None,
            job.parameters,
            engine_name="llamalab",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=str(job.notebook.path.parent),
            autosave_cell_every=0,
            client=client,
        )
