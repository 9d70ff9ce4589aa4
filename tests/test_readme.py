"""The README is true: its commands run, its links lead somewhere, its messages are the tested ones."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from llamalab import catalog, diagnosis
from llamalab.catalog.models_dir import project_directory
from llamalab.catalog.sizes import needs
from llamalab.errors import findings
from llamalab.units import size_text
from llamalab_runs import notebooks

ROOT = project_directory()
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_the_commands_run_from_any_directory_in_order(tmp_path):
    block = re.search(r"<!-- commands: run by [^>]*-->\n```\n(.*?)```", README, re.DOTALL)[1]
    lines = block.splitlines()
    assert len(lines) >= 6
    environment = os.environ | {"LLAMALAB_MODELS_DIR": str(tmp_path / "models")}
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "llamalab"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "llamalab", *words[1:]],
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


def test_the_python_example_runs(tmp_path):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    script = f"import llamalab; llamalab.download('chinese-alpaca-lab')\n{code}"
    environment = os.environ | {"LLAMALAB_MODELS_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    from llamalab_course.family.scoring import cjk_share

    assert cjk_share(done.stdout) == 1.0


def test_the_troubleshooting_table_is_current():
    made = README.split("<!-- findings: made by python -m llamalab.diagnosis -->\n")[1]
    assert made.split("\n\n")[0] == diagnosis.findings_table()
    assert made.split("\n\n")[0].count("\n") == len(findings()) + 1


def test_quoted_messages_are_tested_ones():
    quoted = {text for k in findings().values() for text in re.findall("`([^`]+)`", k.symptom)}
    assert len(quoted) >= 5
    sources = "\n".join(
        p.read_text("utf-8") for p in (ROOT / "lib").rglob("*.py") if p.stem != "diagnosis"
    )
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    assert [text for text in quoted if text not in sources and text != "nan"] == []
    tests = "\n".join(p.read_text("utf-8") for p in (ROOT / "tests").rglob("test_*.py"))
    for words in ("named config.json", "HTML page", "fewer than the base", "already contains"):
        assert words in tests


@pytest.mark.parametrize("path", ["README.md", "data/lab/README.md"])
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert ((ROOT / path).parent / target).exists(), target


def test_figures_that_are_arithmetic_are_the_packages():
    need = needs(catalog.model("chinese-alpaca-7b"))
    assert f"{size_text(need.download)} to download" in README
    assert f"{size_text(need.inference_memory)} of GPU memory" in README


def test_every_lesson_and_target_is_named():
    for lesson in notebooks.lesson_notebooks():
        assert f"(notebooks/{lesson.name})" in README
    for target in ("run", "lab", "demo", "break", "test", "test-heavy", "clean"):
        assert f"make {target}" in README
