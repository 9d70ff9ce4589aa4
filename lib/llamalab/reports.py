"""Reports: rows with a status each, shown as text, in colour on a terminal, as HTML and as JSON."""

import html
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TextIO

GOOD, TOLD, DOUBT, BAD = 32, 36, 33, 31  # the terminal's green, cyan, yellow and red
STATUSES = {"OK": GOOD, "INFO": TOLD, "UNKNOWN": DOUBT}
STATUSES |= dict.fromkeys(("FAIL", "WRONG", "MISSING", "FOUND"), BAD)
# These read well on white and on black; all else keeps the theme's own colours.
_ON_PAGES = {GOOD: "#2e9e4f", TOLD: "#5b8dd9", DOUBT: "#b7950b", BAD: "#e5484d"}


@dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
        status: one of `STATUSES`.
        name: what was looked at: a package, a file, or a finding by its name.
        found, expected: what was seen, and what should have been.
        cause: why it is so, as far as that can be told.
        fix, command: what to do about it, in words and as a command.
    """

    status: str
    name: str
    found: str = ""
    expected: str = ""
    cause: str = ""
    fix: str = ""
    command: str = ""

    @property
    def is_bad(self) -> bool:
        return STATUSES[self.status] == BAD

    @property
    def summary(self) -> str:
        """What was seen, in short: of digests that agree, only which they are."""
        if self.found and self.found == self.expected:
            return ", ".join(part.split()[0] for part in self.found.split(", "))
        return "" if self.expected else self.found

    def more(self) -> dict[str, str]:
        """Return what the summary leaves unsaid, label -> text."""
        texts = asdict(self)
        labels = ["cause", "fix", "command"]
        if self.expected and self.found != self.expected:
            labels = ["expected", "found", *labels]
        return {label: texts[label] for label in labels if texts[label]}


class Report:
    """Rows, and how they show themselves; what is reported on adds fields of its own."""

    rows: Sequence[Row]

    def remarks(self) -> list[str]:
        """Return lines that are said below the rows."""
        return []

    @property
    def ok(self) -> bool:
        """Whether no row is bad."""
        return not any(row.is_bad for row in self.rows)

    def as_dict(self) -> dict:
        """Return what JSON can hold; each kind of report adds its fields."""
        return {"ok": self.ok, "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        lines, width = [], max((len(row.name) for row in self.rows), default=0)
        for row in self.rows:
            lines.append(f"{row.status:8} {row.name:{width}}  {row.summary}".rstrip())
            lines += [f"{'':8}   {label:9} {text}" for label, text in row.more().items()]
        return "\n".join(lines + self.remarks())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cell = '<td style="text-align:left;vertical-align:top">'
        rows = ""
        for row in self.rows:
            texts = [html.escape(row.summary)] if row.summary else []
            texts += [f"<b>{label}</b> {html.escape(text)}" for label, text in row.more().items()]
            colour = _ON_PAGES[STATUSES[row.status]]
            rows += f'<tr>{cell}<b style="color:{colour}">{row.status}</b></td>'
            rows += f"{cell}{html.escape(row.name)}</td>{cell}{'<br>'.join(texts)}</td></tr>"
        remarks = "<br>".join(map(html.escape, self.remarks()))
        return f"<table>{rows}</table>" + (f"<p>{remarks}</p>" if remarks else "")


def paint(text: str, colour: int, stream: TextIO) -> str:
    """Return `text` in colour if `stream` is a terminal and NO_COLOR is not set."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"


def painted(report: Report, stream: TextIO) -> str:
    """Return `report` as text, each row's status in its colour where `stream` is a terminal."""
    return re.sub(
        rf"(?m)^({'|'.join(STATUSES)})\b",
        lambda match: paint(match[1], STATUSES[match[1]], stream),
        str(report),
    )
