"""What a batch run leaves to be read: HTML that needs no network."""

import html
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from llamalab.files import write_whole
from llamalab.units import size_text

LONGEST = 100_000
"""Characters of one output that a report shows; the executed notebook holds them all."""


def write_report(notebook: NotebookNode, report: Path) -> None:
    """Write a notebook with its code and outputs as one page that fetches nothing."""
    from nbconvert import HTMLExporter

    notebook = nbformat.from_dict(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # A widget would fetch its program from the network; its plain text says little.
            cell.outputs = [_shortened(o) for o in cell.outputs if not _is_widget(o)]
    programs = "require_js mathjax jquery mermaid_js mermaid_layout_elk_js jupyter_widgets_base"
    exporter = HTMLExporter(**{f"{name}_url": "" for name in programs.split()})
    write_whole(report, exporter.from_notebook_node(notebook)[0])


def _is_widget(output: NotebookNode) -> bool:
    return any("widget-view" in kind for kind in output.get("data", {}))


def _shortened(output: NotebookNode) -> NotebookNode:
    def cut(text: str) -> str:
        if len(text) <= LONGEST:
            return text
        left_out = f"\n[... {len(text) - LONGEST:,} characters are in the notebook only ...]\n"
        return text[: LONGEST // 2] + left_out + text[-LONGEST // 2 :]

    if output.output_type == "stream":
        return NotebookNode(output, text=cut(output.text))
    if output.output_type == "error":
        return NotebookNode(output, traceback=[cut(line) for line in output.traceback])
    data = {
        kind: cut(value) if isinstance(value, str) and kind == "text/plain" else value
        for kind, value in output.data.items()
        # A page cannot show the front of a picture or a table; its plain text stands in.
        if not (isinstance(value, str) and kind == "text/html" and len(value) > 100 * LONGEST)
    }
    return NotebookNode(output, data=NotebookNode(data))


def page(title: str, body: str) -> str:
    """Return a whole page; it fetches nothing, and follows the reader's light or dark."""
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark; font-family: sans-serif }}
body {{ margin: 2em }}
table {{ border-collapse: collapse }}
td, th {{ border: 1px solid #8888; padding: .3em .6em; text-align: left; vertical-align: top }}
td {{ max-width: 40em; overflow-wrap: anywhere; white-space: pre-wrap }}
tr.bad td:first-child {{ border-left: 6px solid #e5484d }}
svg {{ background: white; max-width: 100%; height: auto; margin: 1em 1em 1em 0 }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def table(columns: Sequence[str], rows: Sequence[Mapping], reports: Sequence[str]) -> str:
    """Return rows as an HTML table, each with a link to its report; bytes are told as sizes."""
    names = [name.removesuffix("_bytes") for name in ["report", *columns]]
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = [f"<table><tr>{head}</tr>"]
    for row, report in zip(rows, reports, strict=True):
        cells = [f'<a href="{urllib.parse.quote(report)}">open</a>']
        for name in columns:
            value = row.get(name)
            if name.endswith("_bytes") and isinstance(value, int):
                value = size_text(value)
            cells.append("" if value is None else html.escape(str(value)[:1000]))
        bad = "" if row.get("status", "ok") == "ok" else ' class="bad"'
        lines.append(f"<tr{bad}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return "\n".join(lines) + "</table>"
