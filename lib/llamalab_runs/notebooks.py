"""Notebooks before they run: found, and their parameters read and fitted."""

from __future__ import annotations

import ast
import difflib
import io
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
from llamalab.errors import DamagedFile, NotFound, UsageError

from llamalab.catalog import project_directory


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


def in_effect(notebook: Path, fitted: Mapping[str, object]) -> dict:
    """Return the values of all parameters, defaults included."""
    return {p.name: p.default for p in parameters_of(notebook).values()} | dict(fitted)


def describe(notebook: Path) -> str:
    """Return a table of the notebook's parameters: name, type, default and help."""
    rows = [(p.name, p.type, repr(p.default), p.help) for p in parameters_of(notebook).values()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
