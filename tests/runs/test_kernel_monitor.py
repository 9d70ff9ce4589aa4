"""The watch on a kernel's process: a look belongs to the cell in which it began."""

from __future__ import annotations

import os
from pathlib import Path

from llamalab_runs.kernel_monitor import KernelMonitor


def test_a_look_that_outlasts_its_cell_is_not_booked_for_the_next(monkeypatch):
    monitor, read = KernelMonitor(None, lambda event: None), Path.read_text
    monitor._pid, monitor.cell = os.getpid(), 0

    def next_cell_begins_meanwhile(path, *arguments, **more):
        text = "VmHWM:\t  400000 kB\n" if path.name == "status" else read(path, *arguments, **more)
        monitor.cell = 1
        return text

    monkeypatch.setattr(Path, "read_text", next_cell_begins_meanwhile)
    monitor._look()
    assert monitor.peaks == {0: 400_000 * 1024}
