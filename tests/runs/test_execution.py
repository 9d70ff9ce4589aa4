"""One notebook, truthfully: every way to fail that papermill does not see, by real processes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from nbformat import v4

from books import notebook
from llamalab_runs import execution, run_directory, runner
from llamalab_runs.notebooks import read_notebook
from llamalab_runs.run_directory import Job
from llamalab_runs.worker import run_jobs

pytestmark = pytest.mark.slow

ASYNC = """import asyncio
async def boom(wait=0):
    await asyncio.sleep(wait)
    raise KeyError('lost')
"""
THREAD = """import threading, time
def boom(wait=0):
    time.sleep(wait)
    raise KeyError('lost')
"""
WIDGET = """import ipywidgets as w
def boom(x):
    if x > 1: raise KeyError('lost')
"""

TRAPS = {
    "exit": (["import sys; sys.exit(0)", "print(1)"], "failed", "SystemExit"),
    "exit-last": (["print(1)", "import sys; sys.exit(0)"], "failed", "SystemExit"),
    "error": (["1 / 0", "print(1)"], "failed", "ZeroDivisionError"),
    "widget-callback": (
        [
            WIDGET + "s = w.IntSlider(1)\nd = w.interactive_output(boom, {'x': s})\nd",
            "s.value = 2",
            "print(1)",
        ],
        "failed",
        "KeyError: 'lost' (hidden in widget output)",
    ),
    "widget-output-cleared": (
        ["import ipywidgets as w\nout = w.Output()\nwith out:\n    1 / 0", "out.clear_output()"],
        "failed",
        "ZeroDivisionError",
    ),
    "observer": (
        [WIDGET + "s = w.IntSlider(1)\ns.observe(lambda c: boom(c.new), 'value')\ns.value = 2"],
        "failed",
        "KeyError",
    ),
    "thread": ([THREAD + "threading.Thread(target=boom).start()", "1"], "failed", "a thread"),
    "thread-late": (
        [THREAD + "threading.Thread(target=boom, args=(0.5,)).start()"], "failed", "a thread",
    ),
    "task": ([ASYNC + "asyncio.create_task(boom())", "1"], "failed", "an asyncio task"),
    "task-kept": ([ASYNC + "t = asyncio.create_task(boom())", "1"], "failed", "an asyncio task"),
    "task-late": ([ASYNC + "t = asyncio.create_task(boom(0.5))"], "failed", "an asyncio task"),
    "task-elsewhere": (
        [ASYNC + THREAD.split("\n")[0]
         + "\nasync def two():\n    t = asyncio.create_task(boom())\n    await asyncio.sleep(0.1)\n"
         "threading.Thread(target=lambda: asyncio.run(two())).start()", "1"],
        "failed", "an asyncio task",
    ),
    "killed": (
        ["import os; os.kill(os.getpid(), 9)", "print(1)"],
        "killed", "In cell [2]: the kernel was killed by SIGKILL",
    ),
    "left": (["import os; os._exit(0)", "print(1)"], "killed", "exit code 0"),
    "hang": (["import time; time.sleep(600)", "print(1)"], "timeout", "longer than 3 s"),
    "hang-deaf": (
        ["import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
         "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: pass"],
        "timeout", "longer than 3 s",
    ),
    "no-code": ([], "ok", ""),
    "no-unicode": (["raise ValueError(chr(0xD800))"], "failed", "surrogates"),
    # What looks like a failure and is none.
    "task-awaited": (
        [ASYNC + "t = asyncio.create_task(boom())",
         "try:\n    await t\nexcept KeyError:\n    print('seen')"],
        "ok", "",
    ),
    "expected": (["import sys; print('Traceback', file=sys.stderr)"], "ok", ""),
    "endless-task": (
        ["import asyncio\nasync def tick():\n    while True: await asyncio.sleep(0.1)\n"
         "t = asyncio.create_task(tick())"],
        "ok", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS)
def test_every_trap_ends_with_the_truth(trap, tmp_path):
    cells, status, words = TRAPS[trap]
    path = notebook(tmp_path / "n.ipynb", *cells)
    job = Job(read_notebook(path), {}, tmp_path / "runs" / "a", cell_timeout=3)
    ((_, run),) = run_jobs([job])
    assert (run.status, words in run.error) == (status, True), run.error
    assert "memory" not in run.error  # no evidence, no such word
    manifest = json.loads((run.directory / "manifest.json").read_text())
    assert manifest["status"] == status
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {run.directory.name}
    book = nbformat.read(run.directory / "n.ipynb", as_version=4)
    nbformat.validate(book)
    states = {c["index"]: c["status"] for c in manifest["cells"]}
    code = {i: cell for i, cell in enumerate(book.cells) if cell.cell_type == "code"}
    assert set(states) == set(code)
    told = {i: cell.metadata.papermill.status for i, cell in code.items()}
    words = {"ok": "completed", "not run": "pending"}
    assert told == {i: words.get(state, "failed") for i, state in states.items()}
    if status == "ok":
        assert set(states.values()) == {"ok"}
        return
    # The notebook that is kept says it at the top, and at the cell.
    assert status in book.cells[0].source and run.error.splitlines()[0] in book.cells[0].source
    culprit = next(i for i, state in states.items() if state not in ("ok", "not run"))
    assert any(o.output_type == "error" for o in code[culprit].outputs)
    assert run.error.split(": ")[-1] in run.report.read_text() or "hidden" in run.error
    for i, cell in code.items():
        if states[i] == "not run":
            assert cell.execution_count is None and not cell.outputs


def test_the_manifest_measures_and_digests(tmp_path):
    path = notebook(
        tmp_path / "n.ipynb",
        "held = bytearray(300_000_000); del held",
        "import time; time.sleep(0.5)",
    )
    run = runner.run([path], output_dir=tmp_path / "runs")[0]
    cells = run.cells
    assert cells[1]["peak_rss_bytes"] > 300e6 > cells[2]["peak_rss_bytes"] > 30e6
    assert run.peak_rss_bytes == cells[1]["peak_rss_bytes"]
    assert 0.5 <= cells[2]["seconds"] < run.seconds
    executed = run.directory / "n.ipynb"
    for name, file in (("source", path), ("executed", executed), ("report", run.report)):
        assert run.digests[name] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert run_directory.read_run(run.directory) == run


def test_an_output_of_50_megabytes(tmp_path):
    path = notebook(
        tmp_path / "n.ipynb",
        "for i in range(50): print(chr(97 + i % 26) * 1_000_000)",
        "print('begin' + 'y' * 50_000_000 + 'end')",
    )
    run = runner.run([path], output_dir=tmp_path / "runs")[0]
    assert run.status == "ok", run.error
    assert (run.directory / "n.ipynb").stat().st_size > 100_000_000
    assert run.report.stat().st_size < 3_000_000
    assert "are in the notebook only" in run.report.read_text()


def test_a_memory_limit_ends_the_kernel_and_says_so(tmp_path):
    path = notebook(
        tmp_path / "n.ipynb",
        "import time\nheld = []\nfor _ in range(100):\n    held.append(bytearray(b'x' * 20_000_000))\n"
        "    time.sleep(0.02)",
    )
    run = runner.run([path], output_dir=tmp_path / "runs", memory_limit=400_000_000)[0]
    assert run.status == "killed" and "over the memory limit of 400.0 MB" in run.error
    assert "likely" not in run.error


GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group():
    """A cgroup of 300 MB, to be joined by writing a process id to what is yielded."""
    place = GROUPS / f"llamalab-test-{os.getpid()}"
    try:
        place.mkdir()
        (place / "memory.limit_in_bytes").write_text("300000000")
    except OSError:
        pytest.skip("no cgroup can be made here")
    yield place / "cgroup.procs"
    for _ in range(100):
        try:
            return place.rmdir()
        except OSError:
            time.sleep(0.1)


def test_real_exhaustion_under_a_cgroup_is_called_likely_out_of_memory(tmp_path, group):
    path = notebook(
        tmp_path / "n.ipynb", "held = [bytearray(b'x' * 10_000_000) for _ in range(90)]"
    )
    command = [sys.executable, "-m", "llamalab", "run", str(path)]
    done = subprocess.run(
        ["sh", "-c", f'echo $$ > {group}; exec "$@"', "sh", *command, "--output-dir", "runs"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    (run,) = map(run_directory.read_run, (tmp_path / "runs").glob("2*"))
    assert run.status == "killed" and "likely out of memory" in run.error
    assert "300" not in run.error  # measured, not the limit


def kernels() -> set[int]:
    return {
        p.pid
        for p in psutil.process_iter(["cmdline"])
        if "llamalab_runs.kernel_journal" in str(p.info["cmdline"])
    }


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_run_leaves_nothing(tmp_path, number, code):
    path = notebook(
        tmp_path / "n.ipynb",
        f"open({str(tmp_path / 'began')!r}, 'w').close()\nimport time; time.sleep(600)",
    )
    before = kernels()
    front = subprocess.Popen(
        [sys.executable, "-m", "llamalab", "run", str(path), "--output-dir", "runs"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "began").exists():
        time.sleep(0.05)
    front.send_signal(number)
    assert front.wait(timeout=30) == code
    for _ in range(100):
        if kernels() <= before and not list((tmp_path / "runs").iterdir()):
            break
        time.sleep(0.1)
    assert kernels() <= before
    assert list((tmp_path / "runs").iterdir()) == []
    assert "Traceback" not in front.stderr.read()


def test_asking_the_kernel_meanwhile_disturbs_nothing(tmp_path, monkeypatch):
    asked, ask = [], AsyncKernelClient.kernel_info
    monkeypatch.setattr(
        AsyncKernelClient, "kernel_info", lambda kc, **how: asked.append(kc) or ask(kc, **how)
    )
    monkeypatch.setattr(execution, "NUDGE_SECONDS", 0.01)
    source = "import time\nfrom ipywidgets import interact\n_ = interact(lambda x: x, x=(0, 3))"
    source += "\ntime.sleep(1)"
    book = v4.new_notebook(cells=[v4.new_code_cell(source), v4.new_code_cell("print(1)")])
    nbformat.write(book, tmp_path / "book.ipynb")
    job = Job(read_notebook(tmp_path / "book.ipynb"), {}, tmp_path / "run")
    run_directory.partial_directory(job.directory).mkdir()
    run = execution.execute(job)
    assert run.status == "ok", run.error
    assert len(asked) > 20  # a few are nbclient's own
    executed = nbformat.read(tmp_path / "run" / "book.ipynb", as_version=4)
    assert [cell.execution_count for cell in executed.cells] == [1, 2]
    assert executed.cells[1].outputs[0].text == "1\n"
