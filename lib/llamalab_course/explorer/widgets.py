"""What the view is made of: two widgets that ipywidgets lacks, and HTML of answers.

All that comes from a model or a person is escaped here, or set as plain text in tokens.js. The
JavaScript fetches nothing.
"""

import html
from collections.abc import Sequence
from pathlib import Path

import anywidget
import ipywidgets
import traitlets

from .requests import Result, Token, differences

HERE = Path(__file__).parent
BANDS = [(0.9, "sure"), (0.5, "likely"), (0.1, "unsure"), (0.0, "surprising")]
"""Least probability of each band; a band has a shade and a line of its own in explorer.css."""
LEGEND = " ".join(
    f"<span class='llamalab-answer {band}'>{band} (≥ {least:.0%})</span>" for least, band in BANDS
)
MOST_TOKENS = 1000  # boxes for the tokens of a prompt; a page grows slow with more


class Keys(anywidget.AnyWidget):
    """Tells of Ctrl+Enter and Esc pressed inside the explorer; brings its style sheet along."""

    _esm = HERE / "keys.js"
    _css = HERE / "explorer.css"


class Tokens(anywidget.AnyWidget):
    """An answer's tokens, shaded by probability; a click shows alternatives to branch to.

    `tokens` holds for each {text, share, band, top: [{id, text, share}]}. Choosing an alternative
    sends {place, id}.
    """

    tokens = traitlets.List().tag(sync=True)
    _esm = HERE / "tokens.js"

    def show(self, result: Result) -> None:
        self.tokens = [
            {
                "text": _with_spaces(piece),
                "share": share,
                "band": next(name for least, name in BANDS if share >= least),
                "top": [{"id": i, "text": _with_spaces(p), "share": s} for i, p, s in top],
            }
            for piece, (_, share, top) in zip(result.pieces, result.steps, strict=True)
        ]


def _with_spaces(piece: str) -> str:
    return piece.replace("▁", "␣")


def html_box() -> ipywidgets.HTML:
    return ipywidgets.HTML(layout=ipywidgets.Layout(width="auto"))


def row(children: Sequence[ipywidgets.Widget]) -> ipywidgets.HBox:
    """Return a row that goes on below where it is wider than the page."""
    return ipywidgets.HBox(children, layout=ipywidgets.Layout(flex_flow="row wrap"))


def escaped(text: str) -> str:
    """Return HTML that shows `text` as it is, control characters by their pictures."""
    pictures = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
    text = text.encode("utf-8", "replace").decode()
    return html.escape(text.translate(pictures))


def token_boxes(tokens: Sequence[Token]) -> str:
    """Return HTML of a prompt's tokens, each in a box with its id; of very many, the first."""
    boxes = "".join(
        f"<span class='llamalab-token llamalab-{token.kind}'>{escaped(token.piece)} "
        f"<small>{token.id}</small></span>"
        for token in tokens[:MOST_TOKENS]
    )
    more = len(tokens) - MOST_TOKENS
    return boxes + (f" … and {more} more" if more > 0 else "")


def marked(text: str) -> str:
    """Return HTML of a difference; its style is written out, for reports have none of ours."""
    style = "color: inherit; background: none; font-weight: bold; text-decoration: underline 2px"
    return f"<mark style='{style}'>{escaped(text)}</mark>"


def side_by_side(results: Sequence[Result]) -> str:
    """Return HTML, which needs no widgets: the answers beside each other, differences marked.

    A mark is bold and underlined: it differs from the first answer there; ‸ stands where
    something is missing.
    """
    cells = []
    for result in results:
        request = result.request
        text = "".join(
            marked(piece) if differs else escaped(piece)
            for piece, differs in differences(results[0].text, result.text)
        )
        title = f"{request.model}, template {request.template}, T {request.temperature:g}"
        cells.append(
            f"<td style='text-align: left; vertical-align: top; border: 1px solid'>"
            f"<b>{escaped(title)}</b><pre style='white-space: pre-wrap'>{text}</pre></td>"
        )
    return f"<table><tr>{''.join(cells)}</tr></table>"
