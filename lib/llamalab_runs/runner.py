"""Running notebooks without a reader: checked parameters, and each notebook in a process of its own.

What happens to one notebook is in `execution`; many points of one are in `sweep`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from llamalab.progress import terminal_bar

from llamalab.units import size_text

from .notebooks import find_notebook, fit_parameters, in_effect, lesson_notebooks, parameters_of
from .preflight import memory_to_set_aside, require_room
from .run_directory import Run, new_directory
from .worker import Worker


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
    todo = plan(notebooks, parameters)
    for path, fitted in todo:
        require_room(path, in_effect(path, fitted), memory_limit)
    limits = {"cell_timeout": cell_timeout, "memory_limit": memory_limit}
    runs = []
    with Worker() as worker:
        for path, fitted in todo:
            with cells_bar(path.stem) as on_event:
                runs.append(
                    worker.run(
                        path, new_directory(output_dir, path), fitted, **limits, on_event=on_event
                    )
                )
            if on_end:
                on_end(runs[-1])
            if runs[-1].status != "ok":
                break
    return runs


def plan(
    notebooks: Sequence[str | Path], parameters: Mapping[str, object] | None
) -> list[tuple[Path, dict]]:
    """Return each notebook with the parameters that it takes; see `run`."""
    paths = [find_notebook(name) for name in notebooks] or lesson_notebooks()
    given = dict(parameters or {})
    known = {path: parameters_of(path) for path in paths}
    for name in given:
        if not any(name in declared for declared in known.values()):
            fit_parameters(paths[-1], {name: given[name]})  # raises, with a suggestion
    return [
        (path, fit_parameters(path, {n: v for n, v in given.items() if n in known[path]}))
        for path in paths
    ]


def plan_text(todo: list[tuple[Path, dict]], memory_limit: int | None = None) -> str:
    """Return what would run, with every parameter; refuse what cannot, as `run` would."""
    lines = []
    for path, fitted in todo:
        values = in_effect(path, fitted)
        require_room(path, values, memory_limit)
        needed = size_text(memory_to_set_aside(values, memory_limit))
        lines.append(f"{path.name}, {needed} of memory set aside")
        lines += [f"    {name} = {value!r}" for name, value in values.items()]
    return "\n".join(lines)


@contextlib.contextmanager
def cells_bar(name: str) -> Iterator[Callable[[dict], None]]:
    """Show on a terminal which cell runs; yield what takes a worker's events."""
    with terminal_bar(desc=name, unit="cell", leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(event: dict) -> None:
            if "cell" in event:
                bar.total, bar.n = event["of"], event["cell"] - 1
                bar.refresh()

        yield show
