"""Notebooks before they run: found, read once, their parameters fitted, their needs declared."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib
import inspect
import os
import re
import struct
import sys
import textwrap
from types import ModuleType

import pytest

import llamalab
from books import notebook
from llamalab.cli import main
from llamalab.errors import DamagedFile, NotFound, UsageError
from llamalab.inference import load, model_of
from llamalab_runs import notebooks, sweep

OPENED, CLOSED = 0x20, 0x10  # of Linux' inotify
EVENT = struct.Struct("iIII")
LESSONS = [notebooks.read_notebook(path) for path in notebooks.lesson_notebooks()]


def test_parameters_are_read_with_type_default_and_help(tmp_path):
    found = notebooks.parameters_of(notebook(tmp_path / "n.ipynb"))
    assert found["seed"] == notebooks.Parameter("seed", "int", 1, "a seed")
    assert [p.default for p in found.values()] == ["x", 1, False, 0.5]
    with pytest.raises(DamagedFile, match="name: type = literal"):
        notebooks.parameters_of(notebook(tmp_path / "m.ipynb", parameters="x = open('y')"))
    with pytest.raises(DamagedFile, match="not Python"):
        notebooks.parameters_of(notebook(tmp_path / "m.ipynb", parameters="x: int = = 1"))
    (tmp_path / "bad.ipynb").write_text("<html>")
    with pytest.raises(DamagedFile, match="not a notebook"):
        notebooks.parameters_of(tmp_path / "bad.ipynb")


@pytest.mark.parametrize(
    "given, fitted",
    [
        ({"seed": "007"}, {"seed": 7}),
        ({"warm": "true"}, {"warm": True}),
        ({"warm": False}, {"warm": False}),
        ({"heat": "1"}, {"heat": 1.0}),
        ({"name": "true"}, {"name": "true"}),
    ],
)
def test_values_take_the_declared_type(tmp_path, given, fitted):
    found = notebooks.read_notebook(notebook(tmp_path / "n.ipynb")).fit(given)
    assert found == fitted and [type(v) for v in found.values()] == [
        type(v) for v in fitted.values()
    ]


@pytest.mark.parametrize(
    "given", [{"seed": "1.5"}, {"warm": "maybe"}, {"seed": True}, {"heat": "x"}]
)
def test_values_that_do_not_fit_are_refused(tmp_path, given):
    with pytest.raises(UsageError, match="wants"):
        notebooks.read_notebook(notebook(tmp_path / "n.ipynb")).fit(given)


def test_lessons_by_number_and_name():
    assert (
        notebooks.find_notebook("02").stem
        == notebooks.find_notebook("02_convert").stem
        == "02_convert"
    )
    with pytest.raises(NotFound, match="no notebook"):
        notebooks.find_notebook("99")
    text = notebooks.read_notebook(notebooks.find_notebook("04")).describe()
    assert re.search(r"^seed +int +", text, re.MULTILINE)


@contextlib.contextmanager
def opens_of(path):
    """Yield a function that tells how often any process has opened a file."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the system does not tell who opens a file")
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK)
    assert watch >= 0 and libc.inotify_add_watch(watch, os.fsencode(path), OPENED | CLOSED) >= 0
    opened = 0

    def count() -> int:
        nonlocal opened
        with contextlib.suppress(BlockingIOError):  # which is all that there is to be told
            events = EVENT.iter_unpack(os.read(watch, 65536))
            # Without the closing in between, one that follows its like would not be told.
            opened += sum(bool(mask & OPENED) for _, mask, _, _ in events)
        return opened

    yield count
    os.close(watch)


def test_a_run_and_a_whole_sweep_read_the_notebook_once(tmp_path, capsys):
    path, out = notebook(tmp_path / "n.ipynb", "print(seed)"), str(tmp_path / "runs")
    grid = ["--sweep", "seed=1,2", "--output-dir", out]
    for how in (["--output-dir", out], ["--help-notebook", str(path)], ["--prepare-only"], grid):
        with opens_of(path) as count:
            assert main(["run", str(path), *how]) == 0
            assert count() == 1, how
    with opens_of(path) as count:
        notebooks.read_notebook(path)
        notebooks.read_notebook(path)
        assert count() == 2


def test_what_runs_is_what_was_read(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "assert seed < 3")
    swept = sweep.prepare(path, {"seed": [1, 2]}, {}, tmp_path / "runs")
    path.unlink()
    runs = sweep.run_sweep(swept)
    assert [run.status for run in runs] == ["ok", "ok"]
    assert runs[0].digests["source"] == swept.notebook.digest


def reached(tree: ast.AST, names: dict, package: str, seen: set) -> set:
    """Return every function and class of ours that a piece of code leads to, by name.

    Args:
        names: what its global names mean; its own imports of ours are added.
        seen: what is known already; it grows.
    """
    names = dict(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or node.module.startswith("llamalab")):
            module = importlib.import_module("." * node.level + (node.module or ""), package)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{module.__name__}.{alias.name}")
                names[alias.asname or alias.name] = getattr(module, alias.name)
        elif isinstance(node, ast.Import) and "llamalab" in [alias.name for alias in node.names]:
            names["llamalab"] = llamalab
    for node in ast.walk(tree):
        thing = None
        if isinstance(node, ast.Name):
            thing = names.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = names.get(node.value.id)
            thing = getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or thing in seen:
            continue
        if thing.__module__.startswith("llamalab"):
            seen.add(thing)
            home = sys.modules[thing.__module__]
            source = textwrap.dedent(inspect.getsource(thing))
            reached(ast.parse(source), vars(home), home.__package__, seen)
    return seen


def lead_of(lesson: notebooks.Notebook, without: str = "") -> set:
    """Return what of ours a lesson leads to; a line that holds `without` is left out."""
    code = [cell.source for cell in lesson.node.cells if cell.cell_type == "code"]
    lines = [line for line in "\n".join(code).splitlines() if not line.startswith("%")]
    kept = [line for line in lines if not without or without not in line]
    return reached(ast.parse("\n".join(kept)), {}, "", set())


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
def test_a_lesson_declares_memory_where_its_calls_end_in_loading_a_model(lesson):
    assert lesson.needs <= {"memory", "disk"} and "llamalab" in lesson.node.metadata
    assert ("memory" in lesson.needs) == bool({load, model_of} & lead_of(lesson))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.path.stem)
def test_a_lesson_declares_disk_where_it_downloads_converts_or_merges(lesson):
    # What `need` makes unasked is small.
    called = {
        node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for cell in lesson.node.cells
        if cell.cell_type == "code"
        for node in ast.walk(ast.parse(re.sub("(?m)^%.*", "", cell.source)))
        if isinstance(node, ast.Call)
    }
    assert ("disk" in lesson.needs) == bool({"download", "convert", "merge"} & called)


def test_the_explorer_is_seen_to_load_and_its_absence_too():
    lesson = next(lesson for lesson in LESSONS if lesson.path.stem.startswith("06"))
    assert load in lead_of(lesson)
    assert load not in lead_of(lesson, without="Explorer")
