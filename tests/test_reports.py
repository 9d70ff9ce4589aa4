"""One row for every report, shown alike as text, HTML and JSON."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

from llamalab.reports import STATUSES, Report, Row, painted


@dataclass
class Three(Report):
    rows: tuple = (
        Row("OK", "a.pth", "md5 12, sha256 34", "md5 12, sha256 34"),
        Row("WRONG", "<b>", "3 bytes", "4 bytes", "cut off", "fetch it again", "llamalab verify x"),
        Row("INFO", "GPU", "none"),
    )

    def remarks(self):
        return ["& that is all"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_as_text_with_what_agrees_in_short():
    assert str(Three()).splitlines() == [
        "OK       a.pth  md5, sha256",
        "WRONG    <b>",
        "           expected  4 bytes",
        "           found     3 bytes",
        "           cause     cut off",
        "           fix       fetch it again",
        "           command   llamalab verify x",
        "INFO     GPU    none",
        "& that is all",
    ]


def test_as_json_and_as_a_judgement():
    shown = json.loads(json.dumps(Three().as_dict()))
    assert shown["ok"] is False and shown["rows"][1]["cause"] == "cut off"
    assert all(row.is_bad == (row.status == "WRONG") for row in Three.rows)


def test_as_html_nothing_is_markup():
    shown = Three()._repr_html_()
    assert "&lt;b&gt;" in shown and "<b></td>" not in shown and "&amp; that is all" in shown


def test_in_colour_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert painted(Three(), io.StringIO()) == str(Three())
    assert f"\x1b[{STATUSES['WRONG']}mWRONG\x1b[0m" in painted(Three(), Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in painted(Three(), Terminal())
