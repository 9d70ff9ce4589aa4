"""The benchmarks run on a machine without anything prepared, and say what they measured."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from llamalab.catalog.models_dir import project_directory

pytestmark = pytest.mark.slow

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


def test_decoding_is_measured_beside_a_copy(tmp_path):
    words = ["--size", "lab", "--repeats", "1", "--tokens", "4", "--only", "fp32"]
    command = [sys.executable, str(HERE / "decode.py"), *words]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "figures.json")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "figures.json").read_text())
    assert list(held["rows"]) == ["plain transformers, fp32", "llamalab, fp32"]
    for name, rounds in held["rows"].items():
        read, rate = rounds[0]["read"], rounds[0]["rate"]
        assert f"| {name} | {read:.0f} | {rate:.2f} |" in done.stdout
    assert [one["same"] for one in held["batched"]] == [64]


def test_the_kept_figures_of_decoding_and_of_the_rehearsal_are_those_told():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    decoding = json.loads((HERE / "results" / "decode-1b.json").read_text())
    for name, rounds in decoding["rows"].items():
        rate, whole = max(one["rate"] for one in rounds), min(one["whole"] for one in rounds)
        line = next(line for line in text.splitlines() if line.startswith(f"| {name}"))
        assert f"| {rate:.2f} |" in line and line.endswith(f"| {whole:.2f} |"), name
    rehearsal = json.loads((HERE / "results" / "rehearsal-7b.json").read_text())
    for step in rehearsal["steps"]:
        line = next(line for line in text.splitlines() if line.startswith(f"| {step['lesson']} "))
        assert f"| {step['seconds']:.0f} |" in line and f"| {step['memory'] / 1e9:.1f} GB |" in line
        for told, found in ("disk_foretold", "disk"), ("memory_foretold", "memory"):
            if step[told] and not step["streaming"]:
                assert abs(step[found] / step[told] - 1) < 0.15, step["lesson"]


@pytest.mark.heavy
def test_the_course_takes_the_disk_and_memory_that_it_foretells(tmp_path):
    """Lessons 00 to 04 on weights that nobody trained, of 1.2 billion parameters."""
    command = [sys.executable, str(HERE / "rehearsal.py"), "--size", "1b"]
    command += ["--work-dir", str(tmp_path / "work"), "--json", str(tmp_path / "figures.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "figures.json").read_text())["steps"]
    assert [step["lesson"] for step in steps] == ["00", "01", "02", "03", "04"]
    for step in steps[1:]:
        assert step["disk"] == pytest.approx(step["disk_foretold"], rel=0.15)
    assert steps[4]["memory"] == pytest.approx(steps[4]["memory_foretold"], rel=0.15)
    assert all(0 < step["streaming"] < step["memory_foretold"] for step in steps[2:4])
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["runs"]
