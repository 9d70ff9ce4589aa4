"""Many points of one notebook: a grid of parameters, each point in a process of its own.

`<UTC>-<notebook>-<6 hex>/` holds `sweep.json`, a directory for every point, and, once all have
ended, `summary.csv` and `index.html`. The six digits name the grid and the
notebook's text: the same sweep finds its directory again and goes on there.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamalab import __version__, environment
from llamalab.errors import OutputExists, UsageError
from llamalab.files import lock_now, write_whole
from llamalab.progress import say, terminal_bar

from .notebooks import Notebook, find_notebook, read_notebook
from .preflight import memory_to_set_aside, require_resources
from .run_directory import Job, Run, Status, new_directory, read_run
from .sweep_table import write_summary
from .worker import run_jobs


@dataclass(frozen=True)
class Sweep:
    """A sweep: `points` are the parameters of each, in the grid's order, the last name fastest."""

    notebook: Notebook
    swept: dict[str, list]
    points: list[dict]
    directory: Path

    @property
    def index(self) -> Path:
        return self.directory / "index.html"

    def place(self, point: int) -> Path:
        """Return the directory of a point's run."""
        return self.directory / "points" / f"{point:0{len(str(len(self.points)))}}"

    def job(self, point: int, **limits) -> Job:
        """Return what runs at a point; `limits` are those of `Job`."""
        return Job(self.notebook, self.points[point], self.place(point), **limits)

    def runs(self) -> dict[int, Run]:
        """Return the runs of the points that have ended."""
        runs = {i: read_run(self.place(i)) for i in range(len(self.points))}
        return {i: run for i, run in runs.items() if run}


def prepare(
    notebook: str | Path,
    swept: Mapping[str, Sequence],
    parameters: Mapping[str, object] | None = None,
    output_dir: str | Path = "runs",
    *,
    memory_limit: int | None = None,
    on: str | None = None,
) -> Sweep:
    """Check every point, and return the sweep: the one begun before, if there is one.

    Raises:
        UsageError: a name or a value that does not fit, or is given twice.
        NotEnoughRoom: a point's model cannot fit this machine; a cluster is asked later.
    """
    book, fixed = read_notebook(find_notebook(notebook)), dict(parameters or {})
    grid = {}
    for name, values in swept.items():
        if name in fixed:
            raise UsageError(f"'{name}' is both swept and given.", "", "Drop -p or --sweep.")
        grid[name] = [book.fit({name: value})[name] for value in values]
        if not grid[name] or len({json.dumps(value) for value in grid[name]}) < len(grid[name]):
            raise UsageError(f"--sweep {name}: no value, or one that is given twice.")
    fixed = book.fit(fixed)
    points = [fixed | dict(zip(grid, v, strict=True)) for v in itertools.product(*grid.values())]
    for point in points if not on else ():
        require_resources(book, book.in_effect(point), memory_limit)
    text = json.dumps([__version__, book.digest, fixed, grid])
    key = hashlib.sha256(text.encode()).hexdigest()[:6]
    begun = sorted(Path(output_dir).absolute().glob(f"*-{key}/sweep.json"))
    begun = [file for file in begun if file.parent.name.endswith(f"-{book.path.stem}-{key}")]
    directory = begun[-1].parent if begun else new_directory(output_dir, book, key)
    return Sweep(book, grid, points, directory)


def fitting_jobs(sweep: Sweep, jobs: int, memory_limit: int | None = None) -> int:
    """Return how many of the `jobs` asked for the cores and the free memory allow, at least 1."""
    values = [sweep.notebook.in_effect(point) for point in sweep.points]
    needed = max(memory_to_set_aside(value, memory_limit) for value in values)
    ram = environment.memory_available()
    return max(1, min(jobs, cores(), ram // needed if ram else jobs))


def cores() -> int:
    """Return the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def run_sweep(
    sweep: Sweep,
    *,
    jobs: int | None = None,
    cell_timeout: int | None = None,
    memory_limit: int | None = None,
    on: str | None = None,
    on_end: Callable[[int, Run], None] = lambda point, run: None,
) -> list[Run]:
    """Run the points that have not ended, and write the summary; return all runs in order.

    Points that ended are kept, failed ones too; a sweep that has ended before runs its points
    that did not end "ok" again.

    Args:
        jobs: points at once, as far as cores and memory allow; one, if not given, on this
            machine, and what a cluster allows there.
        on: "ray" or an address, "ray://…": run them there.
        on_end: called with the number and the run of each point that ends.

    Raises:
        OutputExists: another process is at the same sweep.
    """
    with _alone(sweep):
        kept = sweep.runs()
        if sweep.index.is_file():  # the sweep has ended before
            kept = {i: run for i, run in kept.items() if run.status == Status.OK}
        todo = [i for i in range(len(sweep.points)) if i not in kept]
        if kept:
            say(f"{len(kept)} of {len(sweep.points)} points had ended before and are kept.")
        for point in todo:
            shutil.rmtree(sweep.place(point), ignore_errors=True)
        limits = {"cell_timeout": cell_timeout, "memory_limit": memory_limit}
        if on and todo:
            from .ray_cluster import run_points

            ended = run_points(sweep, todo, on, limits, jobs)
        else:
            jobs = fitting_jobs(sweep, jobs or 1, memory_limit)
            ended = _run_here(sweep, todo, jobs, limits)
        with contextlib.closing(ended):
            for point, run in ended:
                on_end(point, run)
        runs = sweep.runs()
        write_summary(sweep.directory, sweep.notebook.path.name, sweep.swept, runs)
        return [runs[i] for i in range(len(sweep.points))]


def _run_here(sweep: Sweep, todo: list[int], jobs: int, limits: dict) -> Iterator[tuple[int, Run]]:
    """Run points on this machine, `jobs` at once; yield each as it ends."""
    # Kernels that all use every core would stand in each other's way.
    threads = max(1, cores() // jobs) if jobs > 1 else None
    points = [sweep.job(point, **limits) for point in todo]
    # A terminal shows how many points have ended, and in which cells the others are.
    settings = {"total": len(sweep.points), "initial": len(sweep.points) - len(todo)}
    settings |= {"desc": sweep.notebook.path.stem, "unit": "point"}
    cells = {}
    with terminal_bar(**settings, leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(job: Job, event: dict) -> None:
            if "cell" in event:
                point = int(job.directory.name)
                cells[point] = f"{point}: cell {event['cell']}/{event['of']}"
                bar.set_postfix_str(", ".join(cells.values()))

        ended = run_jobs(points, at_once=jobs, threads=threads, on_event=show)
        with contextlib.closing(ended):
            for job, run in ended:
                point = int(job.directory.name)
                cells.pop(point, None)
                bar.update(1)
                yield point, run


@contextlib.contextmanager
def _alone(sweep: Sweep) -> Iterator[None]:
    """Make the sweep's directory and keep other processes out of it."""
    (sweep.directory / "points").mkdir(parents=True, exist_ok=True)
    with open(sweep.directory / ".lock", "w") as lock:
        if not lock_now(lock):
            raise OutputExists(
                f"Another process is running this sweep in '{sweep.directory}'.",
                "Two at once would run the same points.",
                "Wait for it, or name another --output-dir.",
            )
        for left in (sweep.directory / "points").glob(".*.partial"):  # by one that was killed
            shutil.rmtree(left, ignore_errors=True)
        about = {"notebook": sweep.notebook.path.name, "swept": sweep.swept, "points": sweep.points}
        text = json.dumps(about, ensure_ascii=False, indent=2)
        write_whole(sweep.directory / "sweep.json", text + "\n")
        yield
