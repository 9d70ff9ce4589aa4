"""Running notebooks without a reader: checked parameters, and each notebook in a process of its own.

What happens to one notebook is in `execution`; many points of one are in `sweep`.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamalab.progress import terminal_bar
from llamalab.units import size_text

from .notebooks import Notebook, find_notebook, lesson_notebooks, read_notebook
from .preflight import memory_to_set_aside, require_resources
from .run_directory import Job, Run, Status, new_directory
from .worker import run_jobs


def run(
    notebooks: Sequence[str | Path] = (),
    parameters: Mapping[str, object] | None = None,
    *,
    output_dir: str | Path = "runs",
    cell_timeout: int | None = None,
    memory_limit: int | None = None,
    on_end=None,
) -> list[Run]:
    """Run notebooks in order, and stop at the first that fails.

    Args:
        notebooks: paths, lessons' names or numbers; none means the whole course.
        parameters: name -> value. One notebook must know every name; of several, each takes
            those it declares, and one at least must know each name.
        output_dir: each run gets a directory of its own in it, and all of them an index.
        cell_timeout: seconds that one cell may take.
        memory_limit: bytes of its own that a kernel may hold.
        on_end: called with each finished `Run`.

    Raises:
        UsageError: a parameter that no notebook declares, or a value that does not fit.
        NotEnoughRoom: a model that cannot fit this machine, by arithmetic.
    """
    planned = plan(notebooks, parameters)
    for notebook, fitted in planned:
        require_resources(notebook, notebook.in_effect(fitted), memory_limit)
    runs = []
    for notebook, fitted in planned:
        directory = new_directory(output_dir, notebook)
        runs.append(_run_one(Job(notebook, fitted, directory, cell_timeout, memory_limit)))
        if on_end:
            on_end(runs[-1])
        if runs[-1].status != Status.OK:
            break
    return runs


def plan(
    notebooks: Sequence[str | Path], parameters: Mapping[str, object] | None
) -> list[tuple[Notebook, dict]]:
    """Return each notebook, read, with the parameters that it takes; see `run`."""
    paths = [find_notebook(name) for name in notebooks] or lesson_notebooks()
    books, given = [read_notebook(path) for path in paths], dict(parameters or {})
    for name in given:
        if not any(name in book.parameters for book in books):
            books[-1].fit({name: given[name]})  # raises, with a suggestion
    return [
        (book, book.fit({n: given[n] for n in given if n in book.parameters})) for book in books
    ]


def plan_text(planned: list[tuple[Notebook, dict]], memory_limit: int | None = None) -> str:
    """Return what would run, with every parameter; refuse what cannot, as `run` would."""
    lines = []
    for notebook, fitted in planned:
        values = notebook.in_effect(fitted)
        require_resources(notebook, values, memory_limit)
        needed = size_text(memory_to_set_aside(values, memory_limit))
        lines.append(f"{notebook.path.name}, {needed} of memory set aside")
        lines += [f"    {name} = {value!r}" for name, value in values.items()]
    return "\n".join(lines)


def _run_one(job: Job) -> Run:
    """Run a job; a terminal shows in which cell it is."""
    settings = {"desc": job.notebook.path.stem, "unit": "cell", "leave": False}
    with terminal_bar(**settings, disable=not sys.stderr.isatty()) as bar:

        def show(job: Job, event: dict) -> None:
            if "cell" in event:
                bar.total, bar.n = event["of"], event["cell"] - 1
                bar.refresh()

        ((_, run),) = run_jobs([job], on_event=show)
        return run
