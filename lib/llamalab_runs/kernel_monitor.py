"""A watch on the process of one kernel: what it holds, cell by cell, and how it ended."""

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from nbformat import NotebookNode

from llamalab.units import size_text

CGROUPS = Path("/sys/fs/cgroup")


class KernelMonitor:
    """Watches one kernel: which cell it runs, what it holds, how it ended.

    Args:
        limit: bytes of its own that the kernel and its children may hold; more ends them.
        on_event: called with {"kernel": pid} and with {"cell": number, "of": count}.

    Attributes:
        notebook: what is executed, as far as it has come.
        cell: the index of the cell that runs, or ran last; -1 before the first.
        exit_code: of a kernel that ended before it was asked to.
        seconds, peaks: cell -> what it took, and the most bytes that the kernel held.
    """

    def __init__(self, limit: int | None, on_event: Callable[[dict], None]):
        self.limit, self.on_event = limit, on_event
        self.notebook: NotebookNode | None = None
        self.cell, self.exit_code = -1, None
        self.seconds: dict[int, float] = {}
        self.peaks: dict[int, int] = {}
        self._pid, self._excess = 0, 0
        self._end = threading.Event()

    def start(self, pid: int) -> None:
        self._pid, self._process = pid, psutil.Process(pid)
        self._counter = _oom_counter(pid)
        self._kills = _oom_kills(self._counter)
        self.on_event({"kernel": pid})
        self._thread = threading.Thread(target=self._look_often, daemon=True)
        self._thread.start()

    def begin(self, cell: int) -> None:
        with contextlib.suppress(OSError):  # Linux: the kernel's peak counts from here on
            Path(f"/proc/{self._pid}/clear_refs").write_text("5")
        self.cell, self._began = cell, time.monotonic()
        self.on_event({"cell": cell + 1, "of": len(self.notebook.cells)})

    def end(self) -> None:
        self.seconds[self.cell] = round(time.monotonic() - self._began, 3)
        self._look()

    def stop(self) -> None:
        """Stop watching; whatever is left of the kernel and its children ends."""
        self._end.set()
        if self._pid:
            self._thread.join()
            kill_group(self._pid)

    def cause_of_death(self) -> str:
        """Return why a kernel that was not asked to leave did so, as far as there is evidence."""
        if self._excess:
            return (
                f"the kernel held {size_text(self._excess)}, over the memory limit of "
                f"{size_text(self.limit)}, and was ended."
            )
        if self.exit_code is not None and self.exit_code >= 0:
            return f"the kernel left with exit code {self.exit_code}."
        name = signal.Signals(-self.exit_code).name if self.exit_code else "a signal"
        if name == "SIGKILL" and _oom_kills(self._counter) > self._kills:
            return (
                "the kernel was killed, likely out of memory: the system ended a process for lack of "
                f"it; the kernel held {size_text(self.peaks.get(self.cell, 0))} at its peak."
            )
        return f"the kernel was killed by {name}."

    def _look_often(self) -> None:
        while not self._end.wait(0.05):
            self._look()
            if self.limit and (memory := self._own_memory()) > self.limit:
                self._excess = memory
                kill_group(self._pid)
                return

    def _look(self) -> None:
        cell = self.cell  # before the look: the next cell's peak counts from its own beginning
        try:
            status = Path(f"/proc/{self._pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
        except (OSError, TypeError):  # not Linux, or it has ended
            try:
                peak = self._process.memory_info().rss
            except psutil.Error:
                return
        self.peaks[cell] = max(peak, self.peaks.get(cell, 0))

    def _own_memory(self) -> int:
        """Return the bytes that the kernel and its children hold, pages of files left out."""
        total = 0
        with contextlib.suppress(psutil.Error):
            for process in (self._process, *self._process.children(recursive=True)):
                memory = process.memory_info()
                total += memory.rss - getattr(memory, "shared", 0)
        return total


def kill_group(pid: int) -> None:
    """End a kernel and what it started; kernels lead a process group of their own."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _oom_counter(pid: int) -> Path:
    """Return the file in which the system counts processes ended for lack of memory."""
    group = ""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        group = next((line[3:].lstrip("/") for line in lines if line.startswith("0::")), "")
    # In a container the path may be the host's, and the mount shows our own group.
    for file in (CGROUPS / group / "memory.events", CGROUPS / "memory.events"):
        if file.is_file():
            return file
    return Path("/proc/vmstat")


def _oom_kills(counter: Path) -> int:
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"^oom_kill (\d+)", counter.read_text(), re.MULTILINE)[1])
    return 0
