"""Notebooks before they run: found, read once, and their parameters fitted."""

import ast
import difflib
import hashlib
import io
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llamalab.catalog import project_directory
from llamalab.errors import DamagedFile, NotFound, UsageError


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str


@dataclass(frozen=True)
class Notebook:
    """A notebook as it was when it was read; whoever runs it works on a copy of `node`.

    Attributes:
        path: its file, absolute; it runs in that file's directory.
        node: the parsed notebook.
        digest: sha256 of the file.
        parameters: name -> what the cell tagged `parameters` declares.
        needs: what its metadata says that it asks of a machine, `{"llamalab": {"needs": […]}}`:
            "memory" (it loads the model, to answer), "disk" (it downloads, converts or merges).
    """

    path: Path
    node: NotebookNode
    digest: str
    parameters: dict[str, Parameter]
    needs: frozenset[str]

    def fit(self, given: Mapping[str, object]) -> dict:
        """Return `given` with texts turned into the types that the notebook declares.

        Raises:
            UsageError: an unknown name, or a value that does not fit; nothing has run.
        """
        return {name: _fit(self._parameter(name), value) for name, value in given.items()}

    def _parameter(self, name: str) -> Parameter:
        if name in self.parameters:
            return self.parameters[name]
        raise UsageError(
            f"{self.path.name} has no parameter '{name}'.",
            _nearest(name, self.parameters) or f"It has: {', '.join(self.parameters)}.",
            f"'llamalab run --help-notebook {self.path.stem}' lists them.",
        )

    def in_effect(self, fitted: Mapping[str, object]) -> dict:
        """Return the values of all parameters, defaults included."""
        return {p.name: p.default for p in self.parameters.values()} | dict(fitted)

    def describe(self) -> str:
        """Return a table of the parameters: name, type, default and help."""
        rows = [(p.name, p.type, repr(p.default), p.help) for p in self.parameters.values()]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
        return "\n".join(
            "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


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
    meant = [lesson for lesson in lessons if stem in (lesson.stem, lesson.stem[:2])]
    if len(meant) == 1:
        return meant[0]
    stems = [lesson.stem for lesson in lessons]
    why = _nearest(stem, stems) or f"The lessons are: {', '.join(stems)}."
    raise NotFound(f"There is no notebook '{name}'.", why)


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean {near[0]}?" if near else ""


def lesson_notebooks() -> list[Path]:
    """Return the course's notebooks in order."""
    return sorted((project_directory() / "notebooks").glob("[0-9]*.ipynb"))


def read_notebook(path: Path) -> Notebook:
    """Read a notebook: the one time that a run, or a whole sweep, opens the file.

    Raises:
        DamagedFile: it is not a notebook, or a line of its parameters cell is no declaration.
    """
    try:
        content = path.read_bytes()
        node = nbformat.reads(content.decode("utf-8"), as_version=4)
        needs = frozenset(node.metadata.get("llamalab", {}).get("needs", []))
    except Exception as error:  # nbformat raises many kinds
        raise DamagedFile(f"{path} is not a notebook.", str(error).split("\n")[0]) from None
    digest = hashlib.sha256(content).hexdigest()
    return Notebook(path.absolute(), node, digest, _declared(node, path), needs)


def parameters_of(path: Path) -> dict[str, Parameter]:
    """Return the parameters that the notebook in a file declares; raises as `read_notebook`."""
    return read_notebook(path).parameters


def _declared(node: NotebookNode, path: Path) -> dict[str, Parameter]:
    cells = [cell for cell in node.cells if "parameters" in cell.metadata.get("tags", [])]
    source = "\n".join(cell.source for cell in cells)
    try:
        lines = ast.parse(source).body
    except SyntaxError as error:
        raise DamagedFile(f"{path}: its parameters cell is not Python: {error}.") from None
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    parameters = {}
    for line in lines:
        try:
            name, kind = line.target.id, ast.unparse(line.annotation)
            default = ast.literal_eval(line.value)
        except (AttributeError, ValueError, TypeError):
            raise DamagedFile(
                f"{path}: '{ast.unparse(line)}' is not 'name: type = literal'.",
                "Every line of the parameters cell declares one parameter.",
            ) from None
        parameters[name] = Parameter(name, kind, default, comments.get(line.lineno, ""))
    return parameters


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
