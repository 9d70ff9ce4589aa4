"""The view's own widgets and HTML: nothing is injected, fetched, or left out of the package."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import llamalab_course
from llamalab.catalog.models_dir import project_directory
from llamalab_course.explorer.requests import PromptRequest
from llamalab_course.explorer.session import Explorer
from llamalab_course.explorer.widgets import Keys, Tokens, escaped, side_by_side

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>"


def test_nothing_is_injected(lab):
    assert escaped("<a>\x00\x1b\n") == "&lt;a&gt;␀␛\n"
    result = Explorer(lab, "cpu").answer(PromptRequest("llama-lab", SCRIPT, max_new_tokens=2))
    table = side_by_side([result, replace(result, text=SCRIPT)])
    assert "<script" not in table and "<img" not in table
    assert "&lt;script" in table


def test_no_script_comes_from_the_network():
    for kind in (Keys, Tokens):
        source = str(kind._esm)
        assert "import " not in source and "http" not in source and "innerHTML" not in source


def test_scripts_and_style_are_shipped():
    """Whatever lies beside the modules is package data, and the widgets have it."""
    package = Path(llamalab_course.__file__).parent
    pyproject = tomllib.loads((project_directory() / "pyproject.toml").read_text("utf-8"))
    patterns = pyproject["tool"]["setuptools"]["package-data"]["llamalab_course"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    beside = {path for path in package.rglob("*.*") if path.suffix not in (".py", ".pyc")}
    assert shipped == beside and len(beside) == 3
    assert ".llamalab-explorer" in str(Keys._css) and "render" in str(Keys._esm)
