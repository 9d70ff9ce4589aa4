"""What every notebook of the course uses: bring what is missing, check claims, record results."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from llamalab import catalog
from llamalab.checkpoints import RECORD, compare_file
from llamalab.downloads import download
from llamalab.errors import LabError, NotEnoughRoom, OutOfDate, OutputExists
from llamalab.files import locked
from llamalab.surgery import convert, merge
from llamalab_runs.kernel_journal import RESULTS

MADE_OF = {"base": [], "adapters": [], "converted": ["base"], "merged": ["base", "adapters"]}
"""What `need` can be asked for, and what each is made of."""


class LessonModel:
    """Where a lesson's model lies; what was not asked of `need` may not be there.

    Attributes:
        base, adapters: as downloaded.
        converted: the base in HF layout.
        merged: the model itself; of a model without adapters, `converted`.
    """

    def __init__(self, model: catalog.ModelEntry, models_dir: str | os.PathLike = ""):
        self.model, self.models_dir = model, catalog.models_directory(models_dir)
        self.base = self.models_dir / model.base.name
        self.adapters = [self.models_dir / part.name for part in model.adapters]
        self.converted = self.models_dir / f"{model.base.name}-hf"
        self.merged = self.models_dir / model.name if model.adapters else self.converted

    def __str__(self) -> str:
        return f"{self.model.name} in {self.models_dir}"


def need(model: str, *what: str, models_dir: str | os.PathLike = "") -> LessonModel:
    """Return where `model` lies, and make what is missing, if that is small.

    Args:
        what: "base", "adapters", "converted" (the base in HF layout), "merged".

    Raises:
        NotEnoughRoom: more than 500 MB would have to be fetched or made; the message names the
            lesson and the command that does it.
    """
    entry = catalog.model(model)
    paths = LessonModel(entry, models_dir)
    large = catalog.needs(entry).disk > catalog.AFFORDABLE
    for item in dict.fromkeys(w for name in what for w in [*MADE_OF[name], name]):
        if item == "base":
            _bring(entry.base, paths.base, large, f"{entry.base.name} --source WHERE")
        elif item == "adapters":
            for part, directory in zip(entry.adapters, paths.adapters, strict=True):
                _bring(part, directory, large, part.name)
        elif item == "converted" or not entry.adapters:
            command = f"convert --input-dir {paths.base}"
            _make(convert, (paths.base, paths.converted), large, "02", command)
        else:
            adapters = ",".join(map(str, paths.adapters))
            command = f"merge --base-model {paths.base} --lora-model {adapters}"
            _make(merge, (paths.base, paths.adapters, paths.merged), large, "03", command)
    return paths


def _bring(part: catalog.Part, directory: Path, large: bool, words: str) -> None:
    """Download a part that is not there; a small one is looked at byte by byte."""
    if large:
        if not all((directory / file).is_file() for file in part.files):
            raise _too_large(directory, "01", f"download {words}")
    elif any(
        compare_file(directory / file, file, facts).status in ("MISSING", "WRONG")
        for file, facts in part.files.items()
    ):
        download(part.name, directory.parent)


def _make(verb: Callable, arguments: tuple, large: bool, lesson: str, command: str) -> None:
    """Convert or merge; what we made before is made anew if an input has changed since.

    Of several notebooks that run at once, one makes it and the others wait.
    """
    out = arguments[-1]
    if large:
        if not (out / RECORD).is_file():
            raise _too_large(out, lesson, f"{command} --output-dir {out}")
        return
    with locked(out.parent):
        try:
            verb(*arguments)
        except OutOfDate:
            verb(*arguments, overwrite=True)
        except OutputExists:
            if not (out / RECORD).is_file():
                raise


def _too_large(directory: Path, lesson: str, command: str) -> NotEnoughRoom:
    return NotEnoughRoom(
        f"{directory} is not there yet, or not whole.",
        "It is too large to be fetched or made in passing.",
        f"Work through lesson {lesson} first, or run: llamalab {command}",
    )


class CheckFailed(LabError):
    """A claim of a lesson does not hold on this machine, for this model."""


def expect_true(claim: str, ok: bool, detail: str = "") -> None:
    """Print `[OK] claim`, or fail the run with `[FAIL] claim`.

    Raises:
        CheckFailed: `ok` is false.
    """
    text = claim + (f" ({detail})" if detail else "")
    if not ok:
        raise CheckFailed(f"[FAIL] {text}")
    print(f"[OK]   {text}")


def expect(model: catalog.ModelEntry, name: str, value: float) -> None:
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
    ok, relation = (value <= bound, "at most") if upper else (value >= bound, "at least")
    claim = f"{name.removesuffix('_at_most')} is {value:.3g}, {relation} {bound:g}"
    expect_true(claim, ok, model.name)


def record(**results) -> None:
    """Leave small results in the notebook, where a batch run collects them.

    Args:
        results: anything that JSON can hold.
    """
    from IPython.display import display

    json.dumps(results)  # fails here, where the mistake is
    text = "recorded: " + ", ".join(results)
    display({RESULTS: results, "text/plain": text}, raw=True)
