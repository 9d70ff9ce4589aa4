"""Inside the kernel: what papermill cannot see is written down, for whoever runs the notebook.

Loaded by kernel start-up options, as an IPython extension, so that no cell is added. Its journal
gets a line of JSON for every error that a widget shows in place of failing, that ends a thread,
or that an asyncio task keeps to itself.
"""

import asyncio
import gc
import json
import logging
import sys
import threading
import time
import traceback

RESULTS = "application/vnd.llamalab.results+json"
"""The MIME type under which `lessons.record` leaves results in a notebook."""

PATIENCE = 2.0
"""Seconds that threads and tasks get, after the last cell, to end or to fail."""

SETTLE = "from llamalab_runs import kernel_journal as _journal; await _journal.settle()"
"""What the kernel is asked to do, silently and outside every cell, when the last one has ended."""

_OURS = ("ipykernel", "IPython", "tornado", "zmq", "jupyter_client")
_journal = None


class KernelJournal:
    """Writes errors to a journal, each with the number of the cell that was running."""

    def __init__(self, shell, path: str):
        self._shell, self._path, self._lock = shell, path, threading.Lock()
        self.threads = set(threading.enumerate())
        self._write({"kind": "ready"})

    def add(self, kind: str, error: BaseException) -> None:
        line = {"kind": kind, "cell": self._shell.execution_count}
        line |= {"ename": type(error).__name__, "evalue": str(error)}
        self._write(line | {"traceback": traceback.format_exception(error)})

    def _write(self, line: dict) -> None:
        # Opened each time: nothing is lost when the kernel is killed, nor closed by a notebook.
        with self._lock, open(self._path, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(line) + "\n")


class _AsyncioHandler(logging.Handler):
    """Takes the errors of tasks that asyncio found, unasked for, when they were collected."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            _journal.add("an asyncio task", record.exc_info[1])


def options(path: str) -> list[str]:
    """Return what a kernel's command line needs so that it keeps its journal at `path`."""
    return [f"--IPKernelApp.extra_extensions={__name__}", f"--KernelJournal.path={path}"]


def load_ipython_extension(shell) -> None:
    """Begin to watch; IPython calls this when the kernel starts."""
    global _journal
    _journal = KernelJournal(shell, str(shell.config.KernelJournal.path))
    show, hook = shell.showtraceback, threading.excepthook

    def showtraceback(exc_tuple=None, **how):
        # The cell's own error fails the cell; all others are shown and forgotten.
        own = how.get("running_compiled_code") or how.get("exception_only")
        error = exc_tuple[1] if exc_tuple else sys.exc_info()[1]
        if error is not None and not own:
            _journal.add("widget output", error)
        return show(exc_tuple, **how)

    def excepthook(arguments):
        if arguments.exc_value is not None:
            _journal.add("a thread", arguments.exc_value)
        hook(arguments)

    shell.showtraceback, threading.excepthook = showtraceback, excepthook
    logging.getLogger("asyncio").addHandler(_AsyncioHandler())


async def settle() -> None:
    """Wait a little for what the notebook left running; then look for tasks nobody asked after."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and (_running_tasks() or _running_threads()):
        await asyncio.sleep(0.02)
    gc.collect()  # a lost task tells its error when it is collected
    for thing in gc.get_objects():
        # `type` and not `isinstance`, which would wake lazy modules and proxies.
        if issubclass(type(thing), asyncio.Future) and thing.done() and not thing.cancelled():
            if thing._log_traceback:  # asyncio's own mark: it failed and nobody has looked
                _journal.add("an asyncio task", thing.exception())


def _running_tasks() -> list[asyncio.Task]:
    def file(task) -> str:
        code = getattr(task.get_coro(), "cr_code", None)
        return code.co_filename if code else ""

    others = asyncio.all_tasks() - {asyncio.current_task()}
    return [task for task in others if not any(f"/{name}/" in file(task) for name in _OURS)]


def _running_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if not t.daemon and t not in _journal.threads]
