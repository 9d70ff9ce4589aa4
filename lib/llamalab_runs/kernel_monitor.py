"""A watch on the process of one kernel: what it holds, cell by cell, and how it ended."""

from __future__ import annotations

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
    """Watches one kernel: where it is, what it holds, how it ended.

    Args:
        limit: bytes of its own that the kernel and its children may hold; more ends them.
        tell: called with {"kernel": pid} and with {"cell": number, "of": count}.
    """

    def __init__(self, limit: int | None, tell: Callable[[dict], None]):
        self.limit, self.tell = limit, tell
        self.notebook: NotebookNode | None = None
        self.cell, self.pid, self.exit_code = -1, 0, None
        self.over_limit = 0
        self.seconds: dict[int, float] = {}
        self.peaks: dict[int, int] = {}
        self._end = threading.Event()

    def start(self, pid: int) -> None:
        self.pid, self._process = pid, psutil.Process(pid)
        self._counter = _oom_counter(pid)
        self._kills = _oom_kills(self._counter)
        self.tell({"kernel": pid})
        self._thread = threading.Thread(target=self._look_often, daemon=True)
        self._thread.start()

    def begin(self, cell: int) -> None:
        with contextlib.suppress(OSError):  # Linux: the kernel's peak counts from here on
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        self.cell, self._began = cell, time.monotonic()
        self.tell({"cell": cell + 1, "of": len(self.notebook.cells)})

    def end(self) -> None:
        self.seconds[self.cell] = round(time.monotonic() - self._began, 3)
        self._look()

    def stop(self) -> None:
        """Stop watching; whatever is left of the kernel and its children ends."""
        self._end.set()
        if self.pid:
            self._thread.join()
            kill_group(self.pid)

    def cause_of_death(self) -> str:
        """Return why a kernel that was not asked to leave did so, as far as there is evidence."""
        if self.over_limit:
            return (
                f"the kernel held {size_text(self.over_limit)}, over the memory limit of "
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
            if self.limit and (held := self._held()) > self.limit:
                self.over_limit = held
                kill_group(self.pid)
                return

    def _look(self) -> None:
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
            peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
        except (OSError, TypeError):  # not Linux, or it has ended
            try:
                peak = self._process.memory_info().rss
            except psutil.Error:
                return
        self.peaks[self.cell] = max(peak, self.peaks.get(self.cell, 0))

    def _held(self) -> int:
        """Return the bytes that the kernel and its children hold, pages of files left out."""
        held = 0
        with contextlib.suppress(psutil.Error):
            for process in (self._process, *self._process.children(recursive=True)):
                memory = process.memory_info()
                held += memory.rss - getattr(memory, "shared", 0)
        return held


def kill_group(pid: int) -> None:
    """End a kernel and what it started; kernels lead a process group of their own."""
    with contextlib.suppress(OSError):
        os.killpg(pid, signal.SIGKILL)


def _oom_counter(pid: int) -> Path:
    """Return the file in which the system counts processes ended for lack of memory."""
    groups = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            groups |= {kind: path.lstrip("/") for kind in kinds.split(",")}
    for kind, folder, name in (
        ("memory", CGROUPS / "memory", "memory.oom_control"),  # cgroup 1
        ("", CGROUPS, "memory.events"),  # cgroup 2
    ):
        # In a container the path may be the host's, and the mount shows our own group.
        for file in (folder / groups.get(kind, "") / name, folder / name):
            if kind in groups and file.is_file():
                return file
    return Path("/proc/vmstat")


def _oom_kills(counter: Path) -> int:
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"^oom_kill (\d+)", counter.read_text(), re.MULTILINE)[1])
    return 0
