"""What cannot fit is refused before a kernel starts, with the arithmetic."""

from __future__ import annotations

import nbformat
import pytest

from books import notebook
from llamalab import catalog, environment
from llamalab.catalog.sizes import needs
from llamalab.errors import NotEnoughRoom
from llamalab.units import size_text
from llamalab_runs import notebooks, preflight, runner

MODEL = 'model: str = "chinese-alpaca-7b"\nmodels_dir: str = ""\ndevice: str = "auto"'
NEED = needs(catalog.model("chinese-alpaca-7b"))


@pytest.fixture
def machine(monkeypatch):
    def has(ram: float, gpu: float = 0, disk: float = 10**15):
        monkeypatch.setattr(environment, "memory_available", lambda: int(ram))
        monkeypatch.setattr(environment, "gpu_memory", lambda: int(gpu))
        monkeypatch.setattr(preflight, "disk_free", lambda directory: int(disk))

    return has


def declaring(path, *needs):
    """Write a notebook that declares what it needs; return it, read."""
    book = nbformat.read(notebook(path, "1", parameters=MODEL), as_version=4)
    book.metadata["llamalab"] = {"needs": list(needs)}
    nbformat.write(book, path)
    return notebooks.read_notebook(path)


@pytest.mark.parametrize(
    "declared, ram, gpu, disk, device, short_of",
    [
        ("memory", NEED.cpu_memory, 0, 0, "auto", ""),
        ("memory", NEED.cpu_memory - 1, 0, 0, "auto", "memory on the CPU"),
        ("memory", 1e9, NEED.inference_memory, 0, "auto", ""),
        ("memory", 1e9, NEED.inference_memory, 0, "cpu", "memory on the CPU"),
        ("memory", 1e12, NEED.inference_memory - 1, 0, "cuda:0", "GPU memory"),
        ("disk", 1e9, 0, NEED.disk, "auto", ""),
        ("disk", 1e9, 0, NEED.disk - 1, "auto", "disk"),
        ("", 1e9, 0, 0, "auto", ""),
    ],
)
def test_the_arithmetic_decides(tmp_path, machine, declared, ram, gpu, disk, device, short_of):
    machine(ram, gpu, disk)
    book = declaring(tmp_path / "n.ipynb", *declared.split())
    given = {"models_dir": str(tmp_path), "device": device}
    values = book.in_effect(given)
    if not short_of:
        return preflight.require_resources(book, values)
    with pytest.raises(NotEnoughRoom, match=short_of) as caught:
        preflight.require_resources(book, values)
    assert str(NEED) in str(caught.value)
    with pytest.raises(NotEnoughRoom):
        runner.run([book.path], given, output_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]


def test_what_a_notebook_does_not_declare_is_not_guessed_from_its_text(tmp_path, machine):
    machine(1e9, disk=0)
    path = notebook(tmp_path / "n.ipynb", "load(1); merge(2)", parameters=MODEL)
    ((book, fitted),) = runner.plan([path], {})
    assert book.needs == frozenset()
    preflight.require_resources(book, book.in_effect(fitted))


@pytest.mark.parametrize("number", ["03", "04", "05", "06", "07"])
def test_a_lesson_that_answers_is_refused_where_its_model_does_not_fit(tmp_path, machine, number):
    given = {"model": "chinese-alpaca-7b", "models_dir": str(tmp_path)}
    machine(2e9)
    with pytest.raises(NotEnoughRoom, match="memory on the CPU"):
        runner.run([number], given, output_dir=tmp_path / "runs")
    assert not list(tmp_path.iterdir())
    machine(1e12)
    assert runner.plan_text(runner.plan([number], given))


def test_a_memory_limit_counts_as_the_machines(tmp_path, machine):
    machine(1e12)
    book = declaring(tmp_path / "n.ipynb", "memory")
    with pytest.raises(NotEnoughRoom, match="memory on the CPU"):
        preflight.require_resources(book, book.in_effect({}), 10**9)


def test_the_plan_is_said_and_nothing_runs(tmp_path, machine):
    machine(1e12)
    path = declaring(tmp_path / "n.ipynb", "memory").path
    text = runner.plan_text(runner.plan([path], {"device": "cpu"}))
    assert "n.ipynb" in text and "device = 'cpu'" in text
    assert size_text(NEED.cpu_memory) in text
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]
