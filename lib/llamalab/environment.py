"""What this machine has, and whether that is enough: the rows behind `llamalab check`.

Everything heavy is imported inside the check that needs it, so that a package which is missing
or broken becomes a row of the report and not the end of it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import catalog
from .catalog import Needs, models_directory, sizes
from .files import disk_free
from .reports import Report, Row
from .units import size_text

if TYPE_CHECKING:
    from packaging.requirements import Requirement
OK, FAIL, INFO = "OK", "FAIL", "INFO"
TORCH_PAGE = "pytorch.org/get-started"
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, repr=False)
class Readiness(Report):
    """What this machine has, a row each; `needs` is there when a model was asked about."""

    rows: tuple[Row, ...]
    needs: Needs | None = None

    def as_dict(self) -> dict:
        return super().as_dict() | {"needs": self.needs and self.needs.as_dict()}


def check(model: str | None = None, models_dir: str | os.PathLike = "") -> Readiness:
    """Look at this machine and, given a `model` of the catalogue, whether it can hold it.

    Nothing is downloaded and nothing written. A machine without a GPU is not a failure.

    Raises:
        NotFound: `model` is not in the catalogue.
    """
    wanted = catalog.model(model) if model else None
    needs = sizes.needs(wanted) if wanted else None
    gpu_row, gpu_memory = _gpu()
    ram = memory_available()
    directory = models_directory(models_dir)
    free = disk_free(directory)
    rows = [
        _python(),
        *_packages(),
        _torch(),
        gpu_row,
        *_visible_devices(),
        *_mps(),
        Row(OK, "Memory", f"{size_text(ram)} available")
        if ram is not None
        else Row(INFO, "Memory", "unknown, since psutil does not load"),
        Row(OK, "Disk", f"{size_text(free)} free for models, in {directory}"),
        _font(),
    ]
    if wanted and needs:
        there = min(needs.disk, already_there(wanted, directory))
        rows += fits(needs, free, ram, gpu_memory, there)
    return Readiness(tuple(rows), needs)


def fits(
    needs: Needs, free: int, ram: int | None, gpu_memory: int = 0, there: int = 0
) -> Iterator[Row]:
    """Yield the rows that hold what a model `needs` against what a machine has, in bytes.

    `there` is what already lies on the disk; a `ram` of None is unknown and fails nothing.
    """
    left = max(0, needs.disk - there)
    seen = f"{size_text(needs.disk)} for {needs.model}"
    seen += f", of which {size_text(there)} are there" if there else ""
    fix = f"Free {size_text(left - free)}, or name a directory on a larger disk with "
    fix += "--models-dir (models_dir in a notebook)."
    yield _enough("Disk needed", seen, left <= free, f"{size_text(free)} are free", fix)
    if ram is None:
        return
    seen, there = f"{size_text(needs.streaming_memory)} to convert and merge", size_text(ram)
    fits_ram, fix = needs.streaming_memory <= ram, "Close other programs and kernels."
    yield _enough("Memory needed", seen, fits_ram, f"{there} are available", fix)
    if needs.inference_memory <= gpu_memory:
        seen = f"{size_text(needs.inference_memory)} to answer, on the GPU"
        yield Row(OK, "Memory needed", seen)
    else:
        here = needs.cpu_memory <= ram
        seen = f"{size_text(needs.cpu_memory)} to answer" + (", on the CPU" if here else "")
        there = f"{size_text(max(ram, gpu_memory))} are available"
        fix = "Choose a smaller model ('llamalab models' lists them) or a machine with more "
        fix += "memory; downloading, converting and merging need less and can be done here."
        yield _enough("Memory needed", seen, here, there, fix)


def _enough(name: str, seen: str, ok: bool, there: str, fix: str) -> Row:
    """Return the row on something that is needed; what is there, and a way out, if that is less."""
    return Row(OK, name, seen) if ok else Row(FAIL, name, f"{seen}; {there}", fix=fix)


def memory_available(cgroups: Path = CGROUPS) -> int | None:
    """Return the bytes of memory that a new program can have, or None without psutil.

    In a container that is what its limit leaves, not what the machine around it has.
    """
    try:
        import psutil
    except Exception:  # broken in any way, the report goes on
        return None
    available = psutil.virtual_memory().available
    try:
        allowed = int((cgroups / "memory.max").read_text())
        used = int((cgroups / "memory.current").read_text())
        stat = (cgroups / "memory.stat").read_text()
    except (OSError, ValueError):  # no such cgroup, or no limit: the word "max"
        return available
    # Pages of files count as used until somebody needs the room.
    pages = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    available = min(available, allowed - used + (int(pages[1]) if pages else 0))
    return max(0, available)


def gpu_memory() -> int:
    """Return the free bytes of the roomiest GPU, 0 without one."""
    return _gpu()[1]


def already_there(model: catalog.ModelEntry, directory: Path) -> int:
    """Return the bytes that lie in the models `directory` of what `model` needs there."""
    names = {part.name for part in model.parts} | {f"{model.base.name}-hf", model.name}
    return sum(
        file.stat().st_size
        for name in names
        for file in (directory / name).rglob("*")
        if file.is_file()
    )


def _python() -> Row:
    machine = f"{platform.system()} {platform.machine()}"
    return Row(OK, "Python", f"{platform.python_version()}, {machine}, {sys.executable}")


def _packages() -> Iterator[Row]:
    """Yield a row for each package that the installed llamalab says it requires."""
    try:
        from packaging.requirements import Requirement
    except Exception as error:
        detail = f"does not load: {_first_line(error)}"
        yield Row(FAIL, "packaging", detail, fix=_reinstall("packaging"))
        return
    try:
        required = importlib.metadata.requires("llamalab") or []
    except importlib.metadata.PackageNotFoundError:
        yield Row(INFO, "Packages", "not compared: llamalab runs from its source, not installed")
        return
    modules: dict[str, list[str]] = {}
    for module, owners in importlib.metadata.packages_distributions().items():
        for owner in owners:
            modules.setdefault(_normal(owner), []).append(module)
    for line in required:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            yield _package(wanted, modules.get(_normal(wanted.name), []))


def _package(wanted: Requirement, modules: list[str]) -> Row:
    name, fix = wanted.name, _reinstall(str(wanted))
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Row(FAIL, name, f"is not installed; needed: {wanted.specifier}", fix=fix)
    if not wanted.specifier.contains(found, prereleases=True):
        return Row(FAIL, name, f"{found} is outside of {wanted.specifier}", fix=fix)
    for module in modules:
        if _normal(module) != _normal(name):
            continue
        try:
            importlib.import_module(module)
        except Exception as error:
            return Row(FAIL, name, f"{found} does not load: {_first_line(error)}", fix=fix)
    return Row(OK, name, found)


def _torch() -> Row:
    try:
        import torch
    except Exception as error:
        return Row(FAIL, "PyTorch", f"does not load: {_first_line(error)}", fix=_reinstall("torch"))
    if torch.version.cuda:
        build = f"CUDA {torch.version.cuda} build"
    elif getattr(torch.version, "hip", None):
        build = f"ROCm {torch.version.hip} build"
    else:
        build = "build without CUDA"
    return Row(OK, "PyTorch", f"{torch.__version__}, {build}, {torch.get_num_threads()} threads")


def _gpu() -> tuple[Row, int]:
    """Return the row on GPUs and the free bytes of the roomiest one."""
    try:
        import torch

        if torch.cuda.is_available():
            gpus = [
                (torch.cuda.get_device_name(i), *torch.cuda.mem_get_info(i))
                for i in range(torch.cuda.device_count())
            ]
            detail = "; ".join(
                f"{name}, {size_text(free)} of {size_text(total)} free"
                for name, free, total in gpus
            )
            return Row(OK, "GPU", detail), max(free for _, free, _ in gpus)
        built = torch.version.cuda or getattr(torch.version, "hip", None)
    except Exception as error:
        return Row(INFO, "GPU", f"cannot be asked: {_first_line(error)}"), 0
    detail = "none that PyTorch can use; every lesson runs on the CPU too"
    if shutil.which("nvidia-smi") and not built:
        detail += f". An NVIDIA driver is here: {TORCH_PAGE} names the PyTorch build for it"
    return Row(INFO, "GPU", detail), 0


def _visible_devices() -> Iterator[Row]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        meaning = f"is '{visible}'" if visible.strip() else "is empty, which hides every NVIDIA GPU"
        yield Row(INFO, "CUDA_VISIBLE_DEVICES", meaning)


def _mps() -> Iterator[Row]:
    try:
        import torch

        if torch.backends.mps.is_available():
            yield Row(OK, "MPS", "the Mac's GPU can be used: device 'mps'")
    except Exception:  # the row on PyTorch says it
        return


def _font() -> Row:
    package = "cvttf_NotoSansCJK_Regular"
    found = importlib.util.find_spec(package)
    for folder in found.submodule_search_locations or [] if found else []:
        for font in Path(folder).glob("*.otf"):
            return Row(OK, "Chinese font", f"{font.name}, for plots")
    fix = _reinstall(package.replace("_", "-").lower())
    return Row(FAIL, "Chinese font", "not found: plots would show empty boxes", fix=fix)


def _reinstall(requirement: str) -> str:
    if _normal(requirement).startswith("torch"):
        return f"Install the build for this machine: {TORCH_PAGE}."
    python = shlex.quote(sys.executable)
    return f"Run: {python} -m pip install --force-reinstall --no-deps '{requirement}'"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
