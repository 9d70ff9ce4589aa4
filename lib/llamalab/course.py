"""What every notebook of the course uses: bring what is missing, check claims, record results."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from . import catalog, estimate, mirror, transfer
from .conversion import convert
from .digest import judge
from .errors import LabError, NotEnoughRoom, OutOfDate, OutputExists
from .merging import merge
from .partial import locked
from .places import models_directory, part_directory
from .witness import RESULTS
from .writer import RECORD

AFFORDABLE = 500_000_000
"""Bytes that a notebook makes unasked; for more, it names the notebook and the command."""


def download(
    name: str,
    models_dir: str | os.PathLike = "",
    source: str | Sequence[str] = (),
    connections: int = transfer.CONNECTIONS,
) -> list[Path]:
    """Bring every part of a model, verified, to its place; the lab family over loopback HTTP.

    Args:
        name: a model or a part of the catalogue.
        source: `[PART=]WHERE`, once or several times: a URL, `hf:OWNER/REPO[@REVISION]` or a
            directory.
        connections: how many to use at once for one large file, at most.

    Returns:
        The parts' directories, the base's first.
    """
    sources = [source] if isinstance(source, str) else list(source)
    sources = [item for item in sources if item]
    from_lab = any(part.source == "lab" for part in catalog.parts_of(name))
    with mirror.lab_source() if from_lab else contextlib.nullcontext() as lab_url:
        return transfer.download(name, models_dir, sources, lab_url, connections)


@dataclass(frozen=True)
class Places:
    """Where a lesson's model lies; what was not asked of `need` may not be there."""

    model: catalog.Model
    models_dir: Path
    base: Path
    adapters: list[Path]
    converted: Path
    merged: Path

    def __str__(self) -> str:
        return f"{self.model.name} in {self.models_dir}"


def need(model: str, *what: str, models_dir: str | os.PathLike = "") -> Places:
    """Return where `model` lies, and make what is missing, if that is small.

    Args:
        what: "base", "adapters", "converted" (the base in HF layout), "merged".

    Raises:
        NotEnoughRoom: more than 500 MB would have to be fetched or made; the message names the
            lesson and the command that does it.
    """
    entry = catalog.model(model)
    root = models_directory(models_dir)
    places = Places(
        model=entry,
        models_dir=root,
        base=part_directory(entry.base.name, models_dir),
        adapters=[part_directory(part.name, models_dir) for part in entry.adapters],
        converted=root / f"{entry.base.name}-hf",
        merged=root / entry.name if entry.adapters else root / f"{entry.base.name}-hf",
    )
    large = estimate.needs(entry).disk > AFFORDABLE
    made_of = {"base": [], "adapters": [], "converted": ["base"], "merged": ["base", "adapters"]}
    for item in dict.fromkeys(w for name in what for w in [*made_of[name], name]):
        if item == "base":
            command = f"llamalab download {entry.base.name} --source WHERE"
            _bring(entry.base, places.base, large, command)
        elif item == "adapters":
            for part, directory in zip(entry.adapters, places.adapters, strict=True):
                _bring(part, directory, large, f"llamalab download {part.name}")
        elif item == "converted" or not entry.adapters:
            command = f"llamalab convert --input-dir {places.base} --output-dir {places.converted}"
            _make(convert, (places.base, places.converted), large, "02", command)
        else:
            lora_model = ",".join(map(str, places.adapters))
            command = f"llamalab merge --base-model {places.base} --lora-model {lora_model}"
            command += f" --output-dir {places.merged}"
            _make(merge, (places.base, places.adapters, places.merged), large, "03", command)
    return places


def _make(verb, arguments: tuple, large: bool, lesson: str, command: str) -> None:
    """Convert or merge; what we made before is made anew if an input has changed since.

    Of several notebooks that run at once, one makes it and the others wait.
    """
    made = arguments[-1]
    if large:
        if not (made / RECORD).is_file():
            raise _too_large(made, lesson, command)
        return
    with locked(made.parent):
        try:
            verb(*arguments)
        except OutOfDate:
            verb(*arguments, overwrite=True)
        except OutputExists:
            if not (made / RECORD).is_file():
                raise
            # Else the reader made it, with other settings: it is used as it is.


def _bring(part: catalog.Part, directory: Path, large: bool, command: str) -> None:
    """Download a part that is not there; a small one is looked at byte by byte."""
    if large:
        if not all((directory / file).is_file() for file in part.files):
            raise _too_large(directory, "01", command)
    elif any(
        judge(directory / file, file, facts).status in ("MISSING", "WRONG")
        for file, facts in part.files.items()
    ):
        download(part.name, directory.parent)


def _too_large(directory: Path, lesson: str, command: str) -> NotEnoughRoom:
    return NotEnoughRoom(
        f"{directory} is not there yet, or not whole.",
        "It is too large to be fetched or made in passing.",
        f"Work through lesson {lesson} first, or run: {command}",
    )


class CheckFailed(LabError):
    """A claim of a lesson does not hold on this machine, for this model."""


def check(claim: str, ok: bool, detail: str = "") -> None:
    """Print `[OK] claim`, or fail the run with `[FAIL] claim`.

    Raises:
        CheckFailed: `ok` is false.
    """
    text = claim + (f" ({detail})" if detail else "")
    if not ok:
        raise CheckFailed(f"[FAIL] {text}")
    print(f"[OK]   {text}")


def expect(model: catalog.Model, name: str, value: float) -> None:
    """Check a measured value against what the catalogue claims for this model, if it does.

    Args:
        name: a key of the catalogue's `expects`: a lower bound, or an upper one where it ends
            in `_at_most`.

    Raises:
        CheckFailed: the catalogue claims more than was measured.
    """
    if name not in model.expects:
        print(f"[INFO] {name} is {value:.3g}; not claimed for this model")
        return
    bound, upper = model.expects[name], name.endswith("_at_most")
    ok = value <= bound if upper else value >= bound
    relation = "at most" if upper else "at least"
    check(f"{name.removesuffix('_at_most')} is {value:.3g}, {relation} {bound:g}", ok, model.name)


def record(**results) -> None:
    """Leave small results in the notebook, where a batch run collects them.

    Args:
        results: anything that JSON can hold.
    """
    from IPython.display import display

    json.dumps(results)  # fails here, where the mistake is
    text = "recorded: " + ", ".join(results)
    display({RESULTS: results, "text/plain": text}, raw=True)


class MemoryWatch:
    """Watches, while its context lasts, how much memory this process holds of its own.

    Attributes:
        grown: bytes, the most that was held beyond what was held at the start.
        exact: whether the system tells pages of files apart, which can be dropped at any time and
            are left out; else they are counted along.
    """

    def __enter__(self) -> MemoryWatch:
        self.grown, self.exact = 0, hasattr(psutil.Process().memory_info(), "shared")
        self._start, self._over = self._held(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    @staticmethod
    def _held() -> int:
        held = psutil.Process().memory_info()
        return held.rss - getattr(held, "shared", 0)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.grown = max(self.grown, self._held() - self._start)


def use_chinese_font() -> str:
    """Make matplotlib draw Chinese on any machine; return the font's name.

    The font, Noto Sans CJK, comes with a package, so that a plot looks the same everywhere.
    """
    import cvttf_NotoSansCJK_Regular
    from matplotlib import font_manager, rcParams

    path = next(Path(cvttf_NotoSansCJK_Regular.__file__).parent.glob("*.otf"))
    font_manager.fontManager.addfont(str(path))
    name = font_manager.FontProperties(fname=str(path)).get_name()
    rcParams["font.family"] = ["DejaVu Sans", name]  # the second draws what the first cannot
    return name
