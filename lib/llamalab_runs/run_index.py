"""All runs in a directory: their index, and which of them are old."""

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from llamalab.files import write_whole

from .html_report import page, table
from .run_directory import read_run

NAME = re.compile(r"(\d{8}T\d{6}Z)-(.+)-[0-9a-f]{6}")


def runs_in(output_dir: Path) -> list[Path]:
    """Return the directories of runs and of sweeps, the newest first."""
    named = [path for path in output_dir.glob("*Z-*") if NAME.fullmatch(path.name)]
    ours = [p for p in named if (p / "manifest.json").is_file() or (p / "sweep.json").is_file()]
    return sorted(ours, key=lambda path: path.name, reverse=True)


def write_index(output_dir: Path) -> None:
    """Write `index.html` over all runs that are there."""
    rows, reports = [], []
    for path in runs_in(output_dir):
        row = {"began": NAME.fullmatch(path.name)[1]}
        if run := read_run(path):
            row |= {"notebook": run.notebook, "status": run.status, "seconds": run.seconds}
            row |= {"peak_rss_bytes": run.peak_rss_bytes, "error": run.error}
            row["parameters"] = ", ".join(f"{k}={v}" for k, v in run.parameters.items())
            reports.append(f"{path.name}/{run.report.name}")
        elif (path / "sweep.json").is_file():
            row |= _sweep_row(path)
            reports.append(f"{path.name}/index.html")
        else:  # a manifest that cannot be read
            continue
        rows.append(row)
    columns = "began notebook status seconds peak_rss_bytes parameters error".split()
    write_whole(output_dir / "index.html", page("Runs", table(columns, rows, reports)))


def _sweep_row(path: Path) -> dict:
    about = json.loads((path / "sweep.json").read_text(encoding="utf-8"))
    runs = [read_run(place) for place in sorted((path / "points").glob("[0-9]*"))]
    ok, all_ended = sum(run.status == "ok" for run in runs if run), (path / "index.html").is_file()
    failed = f"{len([r for r in runs if r]) - ok} of {len(about['points'])} points not ok"
    return {
        "notebook": about["notebook"],
        "status": "unfinished" if not all_ended else "ok" if ok == len(runs) else "failed",
        "seconds": round(sum(run.seconds for run in runs if run), 3),
        "peak_rss_bytes": max((r.peak_rss_bytes or 0 for r in runs if r), default=None),
        "parameters": "sweep of "
        + " x ".join(f"{n} ({len(v)})" for n, v in about["swept"].items()),
        "error": "" if ok == len(runs) else failed,
    }


def prune(output_dir: Path, keep: int, spared: Collection[Path] = ()) -> list[Path]:
    """Remove all but the newest `keep` runs of each notebook; return what was removed.

    What is in `spared`, was not made by a run, or is a sweep that has not ended, stays.
    """
    removed, counts = [], {}
    for path in runs_in(output_dir):
        stem = NAME.fullmatch(path.name)[2]
        counts[stem] = counts.get(stem, 0) + 1
        ended = (path / "manifest.json").is_file() or (path / "index.html").is_file()
        if counts[stem] > keep and ended and path not in spared and not path.is_symlink():
            shutil.rmtree(path)
            removed.append(path)
    return removed
