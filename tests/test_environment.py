"""The environment check: on this machine, on machines made up, and with packages missing or broken."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamalab import catalog, environment, errors, units
from llamalab.catalog import sizes
from llamalab.environment import Readiness, check, fits, memory_available
from llamalab.files import disk_free
from llamalab.reports import Row

LIB = Path(environment.__file__).parents[1]
NEEDS = sizes.needs(catalog.model("chinese-alpaca-7b"))
GB = 10**9


def rows(report: Readiness) -> dict[str, Row]:
    return {row.name: row for row in report.rows}


def check_in_new_process(tmp_path: Path, requires: list[str], code: str = "") -> dict:
    """Run a check where `llamalab` is installed with these requirements; return its JSON."""
    info = tmp_path / "llamalab-0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: llamalab", "Version: 0"]
    lines += [f"Requires-Dist: {line}" for line in requires]
    (info / "METADATA").write_text("\n".join(lines))
    code += "\nimport json, llamalab.environment as e; print(json.dumps(e.check().as_dict()))"
    path = os.pathsep.join((str(tmp_path), str(LIB)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_packages_load_without_a_word_on_standard_error():
    code = "import llamalab; llamalab.check()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_this_machine():
    report = check(models_dir="somewhere/not/there/yet")
    by_name = rows(report)
    assert torch.__version__ in by_name["PyTorch"].found
    assert by_name["GPU"].status == ("OK" if torch.cuda.is_available() else "INFO")
    assert "somewhere" in by_name["Disk"].found
    assert report.needs is None
    assert not Path("somewhere").exists()


def test_every_way_of_showing_it_says_the_same():
    report = Readiness((Row("OK", "A", "1 < 2"), Row("FAIL", "B", "<b>", fix="Do & mend.")))
    assert str(report) == "OK       A  1 < 2\nFAIL     B  <b>\n           fix       Do & mend."
    assert not report.ok
    assert json.loads(json.dumps(report.as_dict()))["rows"][1]["fix"] == "Do & mend."
    shown = report._repr_html_()
    assert "1 &lt; 2" in shown and "Do &amp; mend." in shown and "<b>&lt;b&gt;" not in shown
    assert Readiness((Row("INFO", "GPU", "none"),)).ok


def test_a_model_brings_its_needs_before_anything_is_there(tmp_path):
    report = check("chinese-llama-33b", tmp_path / "new")
    assert report.needs == sizes.needs(catalog.model("chinese-llama-33b"))
    assert units.size_text(report.needs.disk) in rows(report)["Disk needed"].found
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(errors.NotFound, match="chinese-llama-7"):
        check("chinese-lama-7b")


@pytest.mark.parametrize(
    "machine, statuses",
    [
        (dict(free=42 * GB, ram=32 * GB), ["OK", "OK", "OK"]),
        (dict(free=41 * GB, ram=32 * GB), ["FAIL", "OK", "OK"]),
        (dict(free=42 * GB, ram=16 * GB), ["OK", "OK", "OK"]),
        (dict(free=42 * GB, ram=15 * GB), ["OK", "OK", "FAIL"]),
        (dict(free=42 * GB, ram=15 * GB, gpu_memory=16 * GB), ["OK", "OK", "OK"]),
        (dict(free=42 * GB, ram=32 * GB, gpu_memory=8 * GB), ["OK", "OK", "OK"]),
        (dict(free=42 * GB, ram=GB // 5), ["OK", "FAIL", "FAIL"]),
        (dict(free=15 * GB, ram=32 * GB, there=27 * GB), ["OK", "OK", "OK"]),
        (dict(free=42 * GB, ram=None), ["OK"]),
    ],
)
def test_machines_that_can_and_cannot_hold_a_7b(machine, statuses):
    found = list(fits(NEEDS, **machine))
    assert [row.status for row in found] == statuses
    assert all(row.fix for row in found if row.status == "FAIL")


@given(*(st.integers(0, 10**12) for _ in range(4)))
def test_a_machine_never_fails_for_having_more(free, ram, gpu_memory, more):
    def fails(*machine):
        return sum(row.status == "FAIL" for row in fits(NEEDS, *machine))

    assert fails(free + more, ram + more, gpu_memory + more) <= fails(free, ram, gpu_memory)


def test_what_already_lies_there_is_not_asked_for_twice(tmp_path):
    base = tmp_path / "llama-lab" / "lab"
    base.mkdir(parents=True)
    (base / "weights").write_bytes(bytes(123_456))
    (tmp_path / "something-else").write_bytes(bytes(1000))
    report = check("chinese-alpaca-lab", tmp_path)
    assert "123.5 kB are there" in rows(report)["Disk needed"].found


def test_memory_stops_at_the_limit_of_a_container(tmp_path):
    def cgroup(limit: str) -> int:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("700000\n")
        (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\nactive_file 7\n")
        return memory_available(tmp_path)

    assert cgroup("1000000\n") == 400_000
    assert cgroup("500000\n") == 0
    assert cgroup("max\n") > 1_000_000
    assert memory_available(tmp_path / "absent") <= psutil.virtual_memory().total


def test_disk_is_measured_where_the_directory_will_be(tmp_path):
    assert disk_free(tmp_path / "a" / "b") > 0


def test_packages_missing_outdated_and_broken_are_rows(tmp_path):
    for name, body in (("brokenpack", "raise OSError('libxyz.so: not found')"), ("oldpack", "")):
        (tmp_path / f"{name}.py").write_text(body)
        info = tmp_path / f"{name}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
        (info / "top_level.txt").write_text(name)
    requires = ["brokenpack>=1,<2", "oldpack>=2", "nosuchpack>=1", "psutil>=1"]
    requires += ["onlyfortests; extra == 'test'"]
    report = check_in_new_process(tmp_path, requires)
    found = {row["name"]: row for row in report["rows"]}
    assert report["ok"] is False
    assert "does not load: OSError: libxyz.so: not found" in found["brokenpack"]["found"]
    assert "1.5 is outside of >=2" in found["oldpack"]["found"]
    assert "is not installed; needed: >=1" in found["nosuchpack"]["found"]
    assert found["psutil"]["found"] == importlib.metadata.version("psutil")
    assert {row["status"] for name, row in found.items() if name.endswith("pack")} == {"FAIL"}
    assert "onlyfortests" not in found


@pytest.mark.parametrize("module", ["torch", "psutil", "packaging"])
def test_the_check_outlives_a_broken(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("raise ImportError('broken on purpose')")
    report = check_in_new_process(tmp_path, ["torch>=2", "psutil>=1"])
    assert report["ok"] is False
    assert "broken on purpose" in json.dumps(report["rows"])
    assert "Disk" in {row["name"] for row in report["rows"]}


@pytest.mark.parametrize("visible, said", [("", "hides every NVIDIA GPU"), ("1", "is '1'")])
def test_visible_devices_are_told(monkeypatch, visible, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert said in rows(check())["CUDA_VISIBLE_DEVICES"].found


def test_a_gpu_is_described_and_its_free_memory_counts(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"Card {i}")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: ((5, 70 * GB)[i], 80 * GB))
    report = check("chinese-llama-33b")
    assert rows(report)["GPU"].found == (
        "Card 0, 5 bytes of 80.0 GB free; Card 1, 70.0 GB of 80.0 GB free"
    )
    assert report.rows[-1].found.endswith("to answer, on the GPU")
