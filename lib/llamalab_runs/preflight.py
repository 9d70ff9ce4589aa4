"""Before a kernel starts: can this machine hold what a notebook would load or make?

By what the notebook declares and by arithmetic on the catalogue's entry. A notebook that declares
nothing, and a model that the catalogue does not know, are not judged.
"""

from collections.abc import Mapping

from llamalab import catalog, environment
from llamalab.catalog import RUNTIME, Needs, models_directory, needs
from llamalab.errors import NotEnoughRoom
from llamalab.files import disk_free
from llamalab.units import size_text

from .notebooks import Notebook


def model_needs(parameters: Mapping[str, object]) -> Needs | None:
    """Return what the model named by the parameter `model` needs, if the catalogue knows it."""
    name = str(parameters.get("model"))
    return needs(catalog.model(name)) if name in catalog.models() else None


def memory_to_set_aside(parameters: Mapping[str, object], memory_limit: int | None = None) -> int:
    """Return the bytes to set aside for one run on a CPU: the limit, else the arithmetic."""
    need = model_needs(parameters)
    return memory_limit or (need.cpu_memory if need else RUNTIME)


def require_resources(
    notebook: Notebook, parameters: Mapping[str, object], memory_limit: int | None = None
) -> None:
    """Refuse a notebook whose model cannot fit.

    Args:
        parameters: the values in effect, defaults included.
        memory_limit: bytes that the kernel may hold, where that is less than the machine has.

    Raises:
        NotEnoughRoom: too little memory, GPU memory or disk; the message shows the arithmetic.
    """
    need = model_needs(parameters)
    if need is None:
        return
    missing = []
    if "disk" in notebook.needs:
        missing += _missing_disk(need, str(parameters.get("models_dir", "")))
    if "memory" in notebook.needs:
        missing += _missing_memory(need, str(parameters.get("device", "auto")), memory_limit)
    if missing:
        raise NotEnoughRoom(
            f"{notebook.path.name} cannot run with {need.model} here: {'; '.join(missing)}.",
            str(need),
            "Choose a smaller model ('llamalab models' lists them) or a larger machine.",
        )


def _missing_disk(need: Needs, models_dir: str) -> list[str]:
    directory = models_directory(models_dir)
    there = environment.already_there(catalog.model(need.model), directory)
    return _missing("disk", max(0, need.disk - there), disk_free(directory))


def _missing_memory(need: Needs, device: str, memory_limit: int | None) -> list[str]:
    """Return what is missing for answers on `device`; "auto" takes whichever holds the model."""
    ram = environment.memory_available()
    if ram is None:
        return []
    on_cpu = _missing("memory on the CPU", need.cpu_memory, min(ram, memory_limit or ram))
    if not device.startswith("cuda") and not (device == "auto" and on_cpu):
        return on_cpu
    on_gpu = _missing("GPU memory", need.inference_memory, environment.gpu_memory())
    return on_gpu + on_cpu if on_gpu and device == "auto" else on_gpu


def _missing(what: str, needed: int, there: int) -> list[str]:
    if needed <= there:
        return []
    short = size_text(needed - there)
    return [f"{what} {size_text(needed)} needed, {size_text(there)} free, {short} short"]
