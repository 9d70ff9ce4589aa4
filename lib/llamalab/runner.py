"""Running notebooks without a reader: checked parameters, and each notebook in a process of its own.

What happens to one notebook is in `execution`; many points of one are in `sweep`.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import io
import secrets
import sys
import time
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nbformat

from .errors import DamagedFile, NotFound, UsageError
from .estimate import size_text
from .execution import Run
from .places import project_directory
from .preflight import memory_needed, require_room
from .progress import terminal_bar
from .worker import Worker


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str


def find_notebook(name: str | Path) -> Path:
    """Return the notebook that `name` means: a path, a lesson's name, or its number ("04").

    Raises:
        NotFound: there is none, or it is not unique.
    """
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    lessons = lesson_notebooks()
    stem = path.name.removesuffix(".ipynb")
    found = [lesson for lesson in lessons if lesson.stem == stem or lesson.stem[:2] == stem]
    if len(found) == 1:
        return found[0]
    stems = [lesson.stem for lesson in lessons]
    near = difflib.get_close_matches(stem, stems, n=1)
    raise NotFound(
        f"There is no notebook '{name}'.",
        f"Did you mean {near[0]}?" if near else f"The lessons are: {', '.join(stems)}.",
    )


def lesson_notebooks() -> list[Path]:
    """Return the course's notebooks in order."""
    return sorted((project_directory() / "notebooks").glob("[0-9]*.ipynb"))


def parameters_of(notebook: Path) -> dict[str, Parameter]:
    """Return the parameters that a notebook declares in the cell tagged `parameters`.

    Raises:
        DamagedFile: it is not a notebook, or a line of that cell is not a declaration.
    """
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except Exception as error:  # nbformat raises many kinds
        raise DamagedFile(f"{notebook} is not a notebook.", str(error).split("\n")[0]) from None
    source = "\n".join(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise DamagedFile(f"{notebook}: its parameters cell is not Python: {error}.") from None
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for line in lines:
        try:
            name, kind, default = line.target.id, ast.unparse(line.annotation), line.value
            found[name] = Parameter(
                name, kind, ast.literal_eval(default), comments.get(line.lineno, "")
            )
        except (AttributeError, ValueError, TypeError):
            raise DamagedFile(
                f"{notebook}: '{ast.unparse(line)}' is not 'name: type = literal'.",
                "Every line of the parameters cell declares one parameter.",
            ) from None
    return found


def fit_parameters(notebook: Path, given: Mapping[str, object]) -> dict:
    """Return `given` with texts turned into the types that `notebook` declares.

    Raises:
        UsageError: an unknown name, or a value that does not fit; nothing has run.
    """
    declared = parameters_of(notebook)
    fitted = {}
    for name, value in given.items():
        if name not in declared:
            near = difflib.get_close_matches(name, declared, n=1)
            raise UsageError(
                f"{notebook.name} has no parameter '{name}'.",
                f"Did you mean {near[0]}?" if near else f"It has: {', '.join(declared)}.",
                f"'llamalab run --help-notebook {notebook.stem}' lists them.",
            )
        fitted[name] = _fit(declared[name], value)
    return fitted


def _fit(parameter: Parameter, value: object) -> object:
    words = {"true": True, "yes": True, "false": False, "no": False}
    try:
        if parameter.type == "str" and value is not None:
            return str(value)
        if parameter.type == "bool" and str(value).lower() in words:
            return words[str(value).lower()]
        if parameter.type == "int" and not isinstance(value, (bool, float)):
            return int(value)
        if parameter.type == "float" and not isinstance(value, bool):
            return float(value)
    except (ValueError, TypeError):
        pass
    raise UsageError(
        f"{parameter.name} is {value!r}; the notebook wants {parameter.type}.", parameter.help
    )


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
        needed = size_text(memory_needed(values, memory_limit))
        lines.append(f"{path.name}, {needed} of memory set aside")
        lines += [f"    {name} = {value!r}" for name, value in values.items()]
    return "\n".join(lines)


def in_effect(notebook: Path, fitted: Mapping[str, object]) -> dict:
    """Return the values of all parameters, defaults included."""
    return {p.name: p.default for p in parameters_of(notebook).values()} | dict(fitted)


def new_directory(output_dir: str | Path, notebook: Path, key: str = "") -> Path:
    """Return a name that no other run has: `<UTC>-<stem>-<6 hex>`, the last by chance or `key`."""
    began = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return Path(output_dir).absolute() / f"{began}-{notebook.stem}-{key or secrets.token_hex(3)}"


@contextlib.contextmanager
def cells_bar(name: str) -> Iterator[Callable[[dict], None]]:
    """Show on a terminal which cell runs; yield what takes a worker's events."""
    with terminal_bar(desc=name, unit="cell", leave=False, disable=not sys.stderr.isatty()) as bar:

        def show(event: dict) -> None:
            if "cell" in event:
                bar.total, bar.n = event["of"], event["cell"] - 1
                bar.refresh()

        yield show


def describe(notebook: Path) -> str:
    """Return a table of the notebook's parameters: name, type, default and help."""
    rows = [(p.name, p.type, repr(p.default), p.help) for p in parameters_of(notebook).values()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
