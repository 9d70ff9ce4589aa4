"""Reports: rows with a status each, as text, in colour on a terminal, and as HTML."""

from __future__ import annotations

import os
from typing import TextIO

COLOURS = {"OK": 32, "INFO": 36, "UNKNOWN": 33}
COLOURS |= dict.fromkeys(("FAIL", "WRONG", "MISSING", "FOUND"), 31)


def paint(text: str, colour: int, stream: TextIO) -> str:
    """Return `text` in colour if `stream` is a terminal and NO_COLOR is not set."""
    plain = not stream.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\x1b[{colour}m{text}\x1b[0m"
