"""What cannot fit is refused before a kernel starts, with the arithmetic."""

from __future__ import annotations

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


ANSWER, MAKE = "from llamalab import load\nload(model)", "from llamalab import merge\nmerge()"


@pytest.mark.parametrize(
    "code, ram, gpu, disk, device, short_of",
    [
        (ANSWER, NEED.cpu_memory, 0, 0, "auto", ""),
        (ANSWER, NEED.cpu_memory - 1, 0, 0, "auto", "memory on the CPU"),
        (ANSWER, 1e9, NEED.inference_memory, 0, "auto", ""),
        (ANSWER, 1e9, NEED.inference_memory, 0, "cpu", "memory on the CPU"),
        (ANSWER, 1e12, NEED.inference_memory - 1, 0, "cuda:0", "GPU memory"),
        (MAKE, 1e9, 0, NEED.disk, "auto", ""),
        (MAKE, 1e9, 0, NEED.disk - 1, "auto", "disk"),
        ("1 + 1", 1e9, 0, 0, "auto", ""),
    ],
)
def test_the_arithmetic_decides(tmp_path, machine, code, ram, gpu, disk, device, short_of):
    machine(ram, gpu, disk)
    path = notebook(tmp_path / "n.ipynb", code, parameters=MODEL)
    values = notebooks.in_effect(path, {"models_dir": str(tmp_path), "device": device})
    if not short_of:
        return preflight.require_room(path, values)
    with pytest.raises(NotEnoughRoom, match=short_of) as caught:
        preflight.require_room(path, values)
    assert str(NEED) in str(caught.value)
    with pytest.raises(NotEnoughRoom):
        runner.run([path], {"models_dir": str(tmp_path), "device": device}, output_dir=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]


def test_a_memory_limit_counts_as_the_machines(tmp_path, machine):
    machine(1e12)
    path = notebook(tmp_path / "n.ipynb", ANSWER, parameters=MODEL)
    with pytest.raises(NotEnoughRoom, match="memory on the CPU"):
        preflight.require_room(path, notebooks.in_effect(path, {}), 10**9)


def test_the_plan_is_said_and_nothing_runs(tmp_path, machine):
    machine(1e12)
    path = notebook(tmp_path / "n.ipynb", ANSWER, parameters=MODEL)
    text = runner.plan_text(runner.plan([path], {"device": "cpu"}))
    assert "n.ipynb" in text and "device = 'cpu'" in text
    assert size_text(NEED.cpu_memory) in text
    assert [p.name for p in tmp_path.iterdir()] == ["n.ipynb"]
