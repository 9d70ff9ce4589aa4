"""Running notebooks: a true status, and a report that needs no network."""

from __future__ import annotations

import json
import re

import pytest

from books import notebook
from llamalab.errors import UsageError
from llamalab_runs import runner

pytestmark = pytest.mark.slow


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
