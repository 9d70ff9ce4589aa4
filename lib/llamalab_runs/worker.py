"""Processes that run notebooks: each notebook in one of its own, none left behind.

They fork from a server that has imported papermill once. The pipe to the front is also a leash:
when the front closes it, or is killed, the notebook ends and its kernel with it.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from types import ModuleType

from .kernel_monitor import kill_group
from .run_directory import Job, Run, Status, abandon, partial_directory, read_run, write_unrun

TRIES = 2
"""How often a notebook is run whose process, not its kernel, was killed by somebody."""

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["llamalab_runs.execution", "nbconvert"])


def run_jobs(
    jobs: Iterable[Job],
    *,
    at_once: int = 1,
    threads: int | None = None,
    on_event: Callable[[Job, dict], None] = lambda job, event: None,
) -> Iterator[tuple[Job, Run]]:
    """Run jobs; yield each with its run as it ends. Closing the iterator ends what still runs.

    Args:
        threads: how many PyTorch may use in a kernel; None leaves it the choice.
        on_event: called with a job and {"kernel": pid} or {"cell": number, "of": count}.
    """
    environment = dict(os.environ)
    if threads:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    waiting = [(job, TRIES) for job in jobs]
    running: dict[Connection, Worker] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                worker = Worker(*waiting.pop(0), environment)
                running[worker.connection] = worker
            for connection in wait(running):
                worker = running[connection]
                if event := worker.next_event():
                    on_event(worker.job, event)
                    continue
                del running[connection]
                if run := worker.outcome():
                    yield worker.job, run
                else:
                    waiting.insert(0, (worker.job, worker.tries_left))
    finally:
        for worker in running.values():
            worker.stop()


class Worker:
    """The front's end of one process that runs one job."""

    def __init__(self, job: Job, tries: int, environment: dict[str, str]):
        self.job, self.tries_left = job, tries - 1
        self._seen = {}
        self.connection, theirs = FORKSERVER.Pipe()
        self._process = FORKSERVER.Process(target=serve, args=(job, environment, theirs))
        try:
            with theirs, _without_main():
                self._process.start()
        except (ConnectionError, EOFError):  # somebody has just killed the server
            time.sleep(1)  # until its death is noticed; the next process starts a new one

    def next_event(self) -> dict | None:
        """Return what the process tells next, or None when it is gone."""
        try:
            event = self.connection.recv()
        except (EOFError, OSError):
            return None
        self._seen.update(event)
        return event

    def outcome(self) -> Run | None:
        """Return the run of a process that is gone, or None when the job is to be tried again."""
        if run := read_run(self.job.directory):
            return run
        self.stop()
        if "error" in self._seen:
            return write_unrun(self.job, Status.FAILED, self._seen["error"])
        if self.tries_left:
            return None
        error = f"The process around the kernel was killed, {TRIES} times."
        return write_unrun(self.job, Status.KILLED, error)

    def stop(self) -> None:
        """End what runs, and remove what it leaves unfinished."""
        self.connection.close()
        if self._process.pid:
            self._process.join(10)
            self._process.kill()
        if "kernel" in self._seen:
            kill_group(self._seen["kernel"])
        abandon(self.job.directory)


def serve(job: Job, environment: dict[str, str], connection: Connection) -> None:
    """Be the process that runs one job, and tell the front of it through `connection`."""
    os.setsid()  # Ctrl-C is for the front, which then closes the leash
    os.dup2(2, 1)  # kernels inherit 1, and what they print there is no answer of ours
    os.environ.clear()  # the server's is as old as the server
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    seen = {}

    def leash() -> None:
        connection.poll(None)  # nothing comes; it returns when the front is gone
        abandon(job.directory)  # first: the kernel's end would be taken for a result
        if "kernel" in seen:
            kill_group(seen["kernel"])
        os._exit(1)

    def pass_on(event: dict) -> None:
        seen.update(event)
        with contextlib.suppress(OSError):  # the front is gone, and the leash ends us
            connection.send(event)

    try:
        partial_directory(job.directory).mkdir(parents=True)
        threading.Thread(target=leash, daemon=True).start()
        from .execution import execute

        execute(job, pass_on)
    except Exception as error:  # a full disk, say: the front tells the reader
        pass_on({"error": f"{type(error).__name__}: {str(error)[:1000]}"})
    os._exit(0)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep multiprocessing from running the program's own script again in each process."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
