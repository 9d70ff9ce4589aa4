"""The benchmarks run on a machine without anything prepared, and say what they measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llamalab.places import project_directory

HERE = project_directory() / "benchmarks"


@pytest.mark.parametrize(
    "name, ours",
    [
        ("convert", ["llamalab convert"]),
        ("merge", ["llamalab merge", "llamalab merge, from Meta's files"]),
    ],
)
def test_a_short_run_prints_a_table_and_writes_json(tmp_path, name, ours):
    words = ["--size", "lab", "--repeats", "1", "--no-peers", "--work-dir", str(tmp_path / "work")]
    command = [sys.executable, str(HERE / f"{name}.py"), *words]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "figures.json").read_text())
    assert held["size"] == "lab" and "cores" in held["machine"]
    rows = {row["name"]: row for row in held["rows"]}
    assert ours == [name for name in rows if name.startswith("llamalab")]
    for name, row in rows.items():
        assert name in done.stdout and len(row["seconds"]) == 1 and row["median"] > 0
    size = (tmp_path / "work/base-lab/7B/consolidated.00.pth").stat().st_size
    assert rows["cp and fsync"]["written"] >= size
    assert all(10e6 < rows[name]["anonymous"] < 300e6 for name in ours)
    left = sorted(path.name for path in (tmp_path / "work").iterdir())
    assert not {"out", "copy", "kept", "theirs", "base-hf"} & set(left)


@pytest.mark.parametrize("name", ["convert-7b", "merge-7b"])
def test_the_kept_figures_are_what_the_lessons_read(name):
    held = json.loads((HERE / "results" / f"{name}.json").read_text())
    rows = {row["name"]: row for row in held["rows"]}
    assert held["size"] == "7b" and all(row["seconds"] for row in rows.values())
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert held["date"] in text
    for row in rows.values():
        assert f"| {row['name']}" in text and f"{row['median']:.1f}" in text, row["name"]
