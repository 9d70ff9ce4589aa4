"""Processes that run notebooks: each notebook in one of its own, none left behind.

A worker has imported papermill once; for every notebook it forks. Its standard input is also its
leash: when the front closes it, or is killed, the notebook ends and its kernel with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path

from . import execution, run_directory
from .kernel_monitor import kill_group
from .run_directory import Run, partial_directory, read_run

TRIES = 2
"""How often a notebook is run whose process, not its kernel, was killed by somebody."""


class Worker:
    """The front's end of a worker: a context manager whose exit ends what still runs.

    Args:
        threads: how many PyTorch may use in a kernel; None leaves it the choice.
    """

    def __init__(self, threads: int | None = None):
        self._environment = dict(os.environ)
        if threads:
            self._environment.setdefault("OMP_NUM_THREADS", str(threads))
        self._process, self._closed = None, False

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """End the worker and what it runs; a thread that is in `run` gets CancelledError."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        if self._process:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)
            self._process.kill()
            self._process = None

    def run(
        self,
        notebook: Path,
        directory: Path,
        parameters: dict,
        cell_timeout: int | None = None,
        memory_limit: int | None = None,
        on_event: Callable[[dict], None] = lambda event: None,
    ) -> Run:
        """Run one notebook, as `execution.execute` does; return the `Run`.

        Args:
            on_event: called with {"kernel": pid} and {"cell": number, "of": count}.
        """
        job = [str(notebook.absolute()), str(directory), parameters, cell_timeout, memory_limit]
        for _ in range(TRIES):
            error = self._run_once(job, on_event)
            if finished := read_run(directory):
                return finished
            shutil.rmtree(partial_directory(directory), ignore_errors=True)
            if self._closed:
                raise CancelledError()
            if error:
                break
        run = Run(notebook.name, parameters, directory, status="failed" if error else "killed")
        run.error = error or f"The process around the kernel was killed, {TRIES} times."
        run_directory.write_unrun(run, notebook)
        return run

    def _run_once(self, job: list, on_event: Callable[[dict], None]) -> str:
        """Return what went wrong in our own program, if something did."""
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "llamalab_runs.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for the front, which then closes the leash
            )
        process, kernel, error = self._process, 0, ""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
        for line in process.stdout:
            event = json.loads(line)
            if "ended" in event:
                if event["ended"] < 0 and kernel:
                    kill_group(kernel)
                return error
            error = event.get("error", error)
            kernel = event.get("kernel", kernel)
            on_event(event)
        self._stop()  # the worker itself was killed
        if kernel:
            kill_group(kernel)
        return ""


def serve_jobs() -> None:
    """Be a worker: a job a line on standard input, what happens as lines on standard output."""
    import papermill.clientwrap  # noqa: F401 - once, and not for each notebook
    from nbconvert import HTMLExporter  # noqa: F401

    answers = os.dup(1)
    os.dup2(2, 1)  # kernels inherit 1, and what they print there is no answer of ours

    def tell(event: dict) -> None:
        with contextlib.suppress(BrokenPipeError):  # the front is gone, and the leash ends us
            os.write(answers, (json.dumps(event) + "\n").encode())

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _run(job, tell)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        # What was cut off is removed here, where nobody can be writing into it any more.
        shutil.rmtree(partial_directory(Path(job[1])), ignore_errors=True)
        tell({"ended": code})


def _run(job: list, tell: Callable[[dict], None]) -> None:
    """Run one notebook and end this process."""
    notebook, directory, parameters, cell_timeout, memory_limit = job
    seen = {}

    def leash() -> None:
        os.read(0, 1)  # nothing comes; it returns when the front is gone
        if "kernel" in seen:
            kill_group(seen["kernel"])
        os._exit(1)  # at once: the kernel's end would be taken for a result, and written down

    def pass_on(event: dict) -> None:
        seen.update(event)
        tell(event)

    threading.Thread(target=leash, daemon=True).start()
    limits = (cell_timeout, memory_limit)
    try:
        execution.execute(Path(notebook), Path(directory), parameters, *limits, tell=pass_on)
    except Exception as error:  # a full disk, say: the front tells the reader
        tell({"error": f"{type(error).__name__}: {str(error)[:1000]}"})
    os._exit(0)


if __name__ == "__main__":
    serve_jobs()
