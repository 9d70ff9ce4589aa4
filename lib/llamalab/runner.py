"""Running notebooks without a reader: papermill, with checked parameters and a true status.

Each run has a directory of its own with the executed notebook, its HTML, which needs no network,
and `manifest.json`.
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import platform
import secrets
import subprocess
import sys
import time
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import nbformat

from . import __version__
from .course import RESULTS
from .errors import DamagedFile, NotFound, UsageError
from .places import project_directory


@dataclass(frozen=True)
class Parameter:
    """One line of a notebook's parameters cell: `name: type = default  # help`."""

    name: str
    type: str
    default: object
    help: str


@dataclass
class Run:
    """One run of one notebook, as `manifest.json` holds it.

    `status` is "ok", "failed" or "killed" (the kernel died); `results` are what the notebook
    recorded; each of `cells` holds index, status and seconds.
    """

    notebook: str
    parameters: dict
    directory: Path
    status: str = "failed"
    error: str = ""
    seconds: float = 0.0
    versions: dict = field(default_factory=dict)
    commit: str | None = None
    cells: list[dict] = field(default_factory=list)
    results: dict = field(default_factory=dict)

    @property
    def report(self) -> Path:
        return self.directory / f"{Path(self.notebook).stem}.html"

    def as_dict(self) -> dict:
        return asdict(self) | {"directory": str(self.directory)}


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
    on_end=None,
) -> list[Run]:
    """Run notebooks in order, and stop at the first that fails.

    Args:
        notebooks: paths, lessons' names or numbers; none means the whole course.
        parameters: name -> value. One notebook must know every name; of several, each takes
            those it declares, and one at least must know each name.
        output_dir: each run gets a directory of its own in it.
        on_end: called with each finished `Run`.

    Raises:
        UsageError: a parameter that no notebook declares, or a value that does not fit.
    """
    paths = [find_notebook(name) for name in notebooks] or lesson_notebooks()
    given = dict(parameters or {})
    known = {path: parameters_of(path) for path in paths}
    for name in given:
        if not any(name in declared for declared in known.values()):
            fit_parameters(paths[-1], {name: given[name]})  # raises, with a suggestion
    plan = [
        (path, fit_parameters(path, {n: v for n, v in given.items() if n in known[path]}))
        for path in paths
    ]
    runs = []
    for path, fitted in plan:
        runs.append(run_notebook(path, fitted, Path(output_dir)))
        if on_end:
            on_end(runs[-1])
        if runs[-1].status != "ok":
            break
    return runs


def run_notebook(notebook: Path, parameters: dict, output_dir: Path) -> Run:
    """Run one notebook with parameters that fit; write its directory; return the `Run`."""
    import papermill
    from nbclient.exceptions import DeadKernelError

    name = (
        f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{notebook.stem}-{secrets.token_hex(3)}"
    )
    directory = output_dir.absolute() / name
    directory.mkdir(parents=True)
    run = Run(notebook.name, parameters, directory, versions=_versions(), commit=_commit())
    executed, began = directory / notebook.name, time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters,
            kernel_name="python3",
            language="python",
            progress_bar=sys.stderr.isatty(),
            cwd=str(notebook.parent),
            # Its warnings are about the loopback connection to us.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        run.status = "ok"
    except DeadKernelError:
        run.status, run.error = "killed", "The kernel died before the notebook ended."
    except papermill.PapermillExecutionError as error:
        run.error = f"{error.ename}: {error.evalue}"
    run.seconds = round(time.monotonic() - began, 3)
    _read_cells(run, executed)
    _write_html(executed, run.report)
    manifest = json.dumps(run.as_dict(), indent=2, ensure_ascii=False)
    (directory / "manifest.json").write_text(manifest + "\n", encoding="utf-8")
    return run


def _read_cells(run: Run, executed: Path) -> None:
    """Take cells' states and recorded results from the executed notebook; trust no silence."""
    for index, cell in enumerate(nbformat.read(executed, as_version=4).cells):
        if cell.cell_type != "code":
            continue
        told = cell.metadata.get("papermill", {})
        ran = cell.execution_count is not None or not cell.source.strip()
        failed = told.get("exception") or any(o.output_type == "error" for o in cell.outputs)
        status = "failed" if failed else "ok" if ran else "not run"
        run.cells.append({"index": index, "status": status, "seconds": told.get("duration")})
        for output in cell.outputs:
            run.results |= output.get("data", {}).get(RESULTS, {})
    if run.status == "ok" and any(cell["status"] != "ok" for cell in run.cells):
        run.status, run.error = "failed", "Not every cell has run."


def _write_html(executed: Path, report: Path) -> None:
    from nbconvert import HTMLExporter

    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        # A widget would fetch its program from the network; its plain text says little.
        cell["outputs"] = [
            output
            for output in cell.get("outputs", [])
            if not any("widget-view" in kind for kind in output.get("data", {}))
        ]
        if cell.cell_type != "code":
            del cell["outputs"]
    exporter = HTMLExporter(
        require_js_url="",
        mathjax_url="",
        jquery_url="",
        mermaid_js_url="",
        mermaid_layout_elk_js_url="",
        jupyter_widgets_base_url="",
    )
    report.write_text(exporter.from_notebook_node(notebook)[0], encoding="utf-8")


def _versions() -> dict[str, str]:
    names = ("torch", "transformers", "papermill", "nbclient")
    found = {name: version(name) for name in names}
    return {"llamalab": __version__, "python": platform.python_version()} | found


def _commit() -> str | None:
    """Return the checkout's commit, or None outside a checkout."""
    command = ["git", "-C", str(project_directory()), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe(notebook: Path) -> str:
    """Return a table of the notebook's parameters: name, type, default and help."""
    rows = [(p.name, p.type, repr(p.default), p.help) for p in parameters_of(notebook).values()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(w) for text, w in zip(row, widths, strict=False)), row[3]])
        for row in rows
    )
