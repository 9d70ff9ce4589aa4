"""The lessons: form, and each one executed alone, in a fresh directory, as a batch user would."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from llamalab.catalog.models_dir import project_directory
from llamalab_runs import notebooks, runner

pytestmark = pytest.mark.slow

LESSONS = notebooks.lesson_notebooks()
IDS = [path.stem for path in LESSONS]
HERE = project_directory() / "notebooks"


@pytest.fixture(params=LESSONS, ids=IDS)
def lesson(request):
    return nbformat.read(request.param, as_version=4), request.param


def test_the_course_is_complete():
    assert IDS[:7] == [
        "00_environment", "01_download_and_verify", "02_convert", "03_merge", "04_inference",
        "05_why_english", "06_explore_prompts",
    ]  # fmt: skip
    assert "07_export" in IDS


def test_form(lesson):
    """No outputs, one parameters cell, short cells, a kernel, the four boxes and no others."""
    book, path = lesson
    nbformat.validate(json.loads(path.read_text("utf-8")))
    assert book.metadata.kernelspec.name == "python3"
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert [i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", [])] == [0]
    lengths = [len(cell.source.splitlines()) for cell in code]
    assert max(lengths) <= 15 and statistics.median(lengths) <= 8
    declared = notebooks.parameters_of(path)
    assert {"model", "models_dir", "device"} <= set(declared)
    assert all(parameter.help for parameter in declared.values())
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for box in ("**Predict.**", "**Cost.**", "**What can go wrong.**"):
        assert box in prose, box
    assert "What we learned" in prose and "2023" in prose


def test_no_lesson_looks_at_a_models_name(lesson):
    book, _ = lesson
    for cell in book.cells:
        if cell.cell_type != "code":
            continue
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Compare):
                text = ast.unparse(node)
                assert "-lab" not in text and "7b" not in text, text


def test_links_lead_somewhere(lesson):
    import re

    book, path = lesson
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


def test_without_llamalab_one_sentence_says_which_kernel(lesson, tmp_path):
    book, _ = lesson
    code = [cell.source for cell in book.cells if cell.cell_type == "code"][:2]
    script = "import sys\nsys.modules['llamalab'] = None\nsys.modules['llamalab_course'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", script + "\n".join(code)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode != 0
    assert "kernel" in done.stderr.strip().splitlines()[-1]
    assert "ModuleNotFoundError" in done.stderr and "During handling" not in done.stderr


@pytest.mark.parametrize("path", LESSONS, ids=IDS)
def test_runs_alone_and_again(path: Path, tmp_path, monkeypatch):
    """In an empty models directory, from another working directory; then once more."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run = runner.run(
            [path], {"models_dir": str(tmp_path / "models")}, output_dir=tmp_path / "runs"
        )[0]
        assert run.status == "ok", run.error
        assert all(cell["status"] == "ok" for cell in run.cells)
        executed = (run.directory / path.name).read_text("utf-8")
        assert "[OK]" in executed and "[FAIL]" not in executed
    assert {p.name for p in tmp_path.iterdir()} <= {"models", "runs"}  # and nothing else is left


def test_why_english_takes_a_model_of_either_family(tmp_path):
    """A model of two adapters, of the family that the lesson does not begin with."""
    path = HERE / "05_why_english.ipynb"
    parameters = {"models_dir": str(tmp_path / "models"), "model": "chinese-alpaca-plus-lab"}
    run = runner.run([path], parameters, output_dir=tmp_path / "runs")[0]
    assert run.status == "ok", run.error
    assert run.results["sound"] > 0.9 >= run.results["suspects"]["3 the base in its place"]


def test_export_without_llama_cpp_says_what_it_leaves_out(tmp_path):
    """The lesson needs gguf alone: where the program itself is missing, only its part is."""
    book = nbformat.read(HERE / "07_export.ipynb", as_version=4)
    first = next(i for i, cell in enumerate(book.cells) if "import llamalab" in cell.source)
    hide = "import sys\n\nsys.modules['xllamacpp'] = None"
    book.cells.insert(first, nbformat.v4.new_code_cell(hide))
    path = tmp_path / "07_export.ipynb"
    nbformat.write(book, path)
    parameters = {"models_dir": str(tmp_path / "models")}
    run = runner.run([path], parameters, output_dir=tmp_path / "runs")[0]
    assert run.status == "ok", run.error
    assert run.results["equal_answers"] == run.results["cut_otherwise"] == {}
    executed = (run.directory / path.name).read_text("utf-8")
    assert "pip install xllamacpp" in executed and "[OK]" in executed
