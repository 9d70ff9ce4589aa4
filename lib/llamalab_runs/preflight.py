"""Before a kernel starts: can this machine hold what a notebook would load or make?

By arithmetic on the catalogue's entry; a model that the catalogue does not know is not judged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import nbformat

from llamalab import catalog, environment
from llamalab.catalog import RUNTIME, Needs, models_directory, needs
from llamalab.errors import NotEnoughRoom
from llamalab.files import disk_free
from llamalab.units import size_text

ANSWERS = re.compile(r"\b(?:load|generate|diagnose)\(")
MAKES = re.compile(r"\b(?:download|convert|merge)\(")


def model_needs(parameters: Mapping[str, object]) -> Needs | None:
    """Return what the model named by the parameter `model` needs, if the catalogue knows it."""
    name = str(parameters.get("model"))
    return needs(catalog.model(name)) if name in catalog.models() else None


def memory_to_set_aside(parameters: Mapping[str, object], memory_limit: int | None = None) -> int:
    """Return the bytes to set aside for one run on a CPU: the limit, else the arithmetic."""
    need = model_needs(parameters)
    return memory_limit or (need.cpu_memory if need else RUNTIME)


def require_room(
    notebook: Path, parameters: Mapping[str, object], memory_limit: int | None = None
) -> None:
    """Refuse a notebook whose model cannot fit.

    Args:
        parameters: the values in effect, defaults included.

    Raises:
        NotEnoughRoom: too little memory, GPU memory or disk; the message shows the arithmetic.
    """
    need = model_needs(parameters)
    if need is None:
        return
    cells = nbformat.read(notebook, as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    directory = models_directory(str(parameters.get("models_dir", "")))
    missing = []
    if MAKES.search(code):
        there = environment.already_there(catalog.model(need.model), directory)
        free = disk_free(directory)
        missing += _missing("disk", need.disk - min(there, need.disk), free)
    ram = environment.memory_available()
    if memory_limit and ram is not None:
        ram = min(ram, memory_limit)
    device = str(parameters.get("device", "auto"))
    if ANSWERS.search(code) and ram is not None:
        on_cpu = _missing("memory on the CPU", need.cpu_memory, ram)
        if device.startswith("cuda") or (device == "auto" and on_cpu):
            on_gpu = _missing("GPU memory", need.inference_memory, environment.gpu_memory())
            missing += on_gpu and (on_gpu if device != "auto" else on_gpu + on_cpu)
        else:
            missing += on_cpu
    if missing:
        raise NotEnoughRoom(
            f"{notebook.name} cannot run with {need.model} here: {'; '.join(missing)}.",
            str(need),
            "Choose a smaller model ('llamalab models' lists them) or a larger machine.",
        )


def _missing(what: str, needed: int, there: int) -> list[str]:
    if needed <= there:
        return []
    short = size_text(needed - there)
    return [f"{what} {size_text(needed)} needed, {size_text(there)} free, {short} short"]
