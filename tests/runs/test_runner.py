"""Running notebooks: checked parameters, a true status, and a report that needs no network."""

from __future__ import annotations

import json
import re

import pytest

from books import notebook
from llamalab.errors import DamagedFile, NotFound, UsageError
from llamalab_runs import notebooks, runner


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
    found = notebooks.fit_parameters(notebook(tmp_path / "n.ipynb"), given)
    assert found == fitted and [type(v) for v in found.values()] == [
        type(v) for v in fitted.values()
    ]


@pytest.mark.parametrize(
    "given", [{"seed": "1.5"}, {"warm": "maybe"}, {"seed": True}, {"heat": "x"}]
)
def test_values_that_do_not_fit_are_refused(tmp_path, given):
    with pytest.raises(UsageError, match="wants"):
        notebooks.fit_parameters(notebook(tmp_path / "n.ipynb"), given)


def test_a_typing_error_is_refused_before_anything_runs(tmp_path):
    path = notebook(tmp_path / "n.ipynb", f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UsageError) as caught:
        runner.run([path], {"sede": 3}, output_dir=tmp_path / "runs")
    assert "Did you mean seed" in caught.value.why
    assert not (tmp_path / "ran").exists() and not (tmp_path / "runs").exists()


def test_a_run_tells_the_truth_and_stops_at_the_first_failure(tmp_path):
    good = notebook(
        tmp_path / "good.ipynb",
        "from llamalab_course.lessons import record\nrecord(twice=2 * seed, text='<script>')",
        "print('done')",
    )
    bad = notebook(tmp_path / "bad.ipynb", "1 / 0", "print('never')")
    killed = notebook(tmp_path / "killed.ipynb", "import os; os.kill(os.getpid(), 9)", "print(1)")
    runs = runner.run([good, bad, killed], {"seed": "4"}, output_dir=tmp_path / "runs")
    assert [r.status for r in runs] == ["ok", "failed"]
    assert runs[0].results == {"twice": 8, "text": "<script>"}
    assert "ZeroDivisionError" in runs[1].error
    assert [c["status"] for c in runs[1].cells][-2:] == ["failed", "not run"]
    runs += runner.run([killed], output_dir=tmp_path / "runs")
    assert runs[2].status == "killed"
    for run in runs:
        manifest = json.loads((run.directory / "manifest.json").read_text())
        assert manifest["status"] == run.status
        assert re.fullmatch(r"\d{8}T\d{6}Z-\w+-[0-9a-f]{6}", run.directory.name)
        report = run.report.read_text()
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//[^"'>]+""", report)
        assert "cdnjs" not in report


def test_sys_exit_is_no_success(tmp_path):
    path = notebook(tmp_path / "n.ipynb", "import sys; sys.exit(0)", "print('never')")
    assert runner.run([path], output_dir=tmp_path)[0].status == "failed"


def test_lessons_by_number_and_name():
    assert (
        notebooks.find_notebook("02").stem
        == notebooks.find_notebook("02_convert").stem
        == "02_convert"
    )
    with pytest.raises(NotFound, match="no notebook"):
        notebooks.find_notebook("99")
    text = notebooks.describe(notebooks.find_notebook("04"))
    assert re.search(r"^seed +int +", text, re.MULTILINE)
