"""What a sweep comes to: one table of parameters and results, and a page that shows it.

A column is a parameter, under its name, or something recorded, as `result.NAME`; what was
recorded as a table of names becomes a column for each.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from llamalab.files import write_whole

from .html_report import page, table
from .run_directory import Run

FIGURES = 12
"""The most that a page draws; the table holds all."""


def write_summary(
    directory: Path, notebook: str, swept: Mapping[str, list], runs: Mapping[int, Run]
) -> None:
    """Write `summary.csv` and `index.html`, in this order."""
    rows = [_row(point, run) for point, run in sorted(runs.items())]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(directory / "summary.csv", text.getvalue())
    reports = [f"{Path(row['directory']) / Path(notebook).stem}.html" for row in rows]
    figures = [_figure(rows, swept, name) for name in _drawn(rows, columns)]
    ok = sum(row["status"] == "ok" for row in rows)
    body = f"<p>{ok} of {len(rows)} points ended ok. The table as "
    body += '<a href="summary.csv">summary.csv</a>.</p>' + "".join(figures)
    body += table([n for n in columns if n != "directory"], rows, reports)
    write_whole(directory / "index.html", page(f"Sweep of {notebook}", body))


def _row(point: int, run: Run) -> dict:
    row = {"point": point, **run.parameters, "status": run.status, "error": run.error}
    row |= {"seconds": run.seconds, "peak_rss_bytes": run.peak_rss_bytes}
    results = [(f"result.{name}", value) for name, value in run.results.items()]
    for name, value in results:  # grows while it is read
        if isinstance(value, dict):
            results += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            row[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value
    return row | {"directory": f"points/{run.directory.name}"}


def _drawn(rows: Sequence[dict], columns: Sequence[str]) -> list[str]:
    """Return the columns worth a figure: numbers that were recorded; else the seconds taken."""

    def is_number(name: str) -> bool:
        values = [row[name] for row in rows if row.get(name) is not None]
        return bool(values) and all(isinstance(value, int | float) for value in values)

    numbers = [name for name in columns if name.startswith("result.") and is_number(name)]
    return (numbers or ["seconds"])[:FIGURES]


def _figure(rows: Sequence[dict], swept: Mapping[str, list], column: str) -> str:
    """Return a column as SVG: over one parameter a plot, over two a heat map of means."""
    import matplotlib
    from matplotlib.figure import Figure

    names = [name for name, values in swept.items() if len(values) > 1] or list(swept)
    across, down = names[0], names[1] if len(names) > 1 else None

    def mean(**wanted) -> float:
        values = [
            row[column]
            for row in rows
            if all(row[name] == value for name, value in wanted.items())
            and row.get(column) is not None
        ]
        return sum(values) / len(values) if values else float("nan")

    # Text stays text: the reader's browser has the fonts, and a "$" is a dollar.
    with matplotlib.rc_context({"svg.fonttype": "none", "text.parse_math": False}):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        labels = [str(value)[:30] for value in swept[across]]
        if down is None:
            axes.plot(labels, [mean(**{across: v}) for v in swept[across]], "o-")
            axes.set_ylabel(column)
        else:
            grid = [[mean(**{across: x, down: y}) for x in swept[across]] for y in swept[down]]
            image = axes.imshow(grid, aspect="auto")
            axes.set_xticks(range(len(labels)), labels)
            axes.set_yticks(range(len(swept[down])), [str(v)[:30] for v in swept[down]])
            axes.set_ylabel(down)
            figure.colorbar(image)
        axes.set_xlabel(across)
        axes.set_title(column + (" (mean)" if len(names) > 2 else ""))
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg")
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]
