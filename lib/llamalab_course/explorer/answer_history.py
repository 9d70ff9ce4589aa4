"""The explorer's answers, kept in a file."""

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from llamalab.catalog import project_directory
from llamalab.errors import DamagedFile
from llamalab.files import locked, write_whole

from .requests import Result

KEPT = 200
"""Results that a history holds; the oldest go first, starred ones never."""


class AnswerHistory:
    """Results in a JSON file, which outlive the kernel; the newest comes last."""

    def __init__(self, path: str | os.PathLike = ""):
        self.path = Path(path) if path else project_directory() / "runs" / "explorer.json"
        self._lock = threading.Lock()

    def read(self) -> list[Result]:
        """Return every result.

        Raises:
            DamagedFile: the file is there and is no history; it is left alone.
        """
        try:
            return [Result.from_dict(values) for values in json.loads(self.path.read_text("utf-8"))]
        except FileNotFoundError:
            return []
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedFile(
                f"{self.path} is not a history of answers.",
                f"It was cut off or changed by hand ({type(error).__name__}).",
                "Move it away: a new one is begun.",
            ) from None

    def add(self, result: Result) -> None:
        self._change(lambda results: [*results, result])

    def delete(self, chosen: Sequence[str]) -> None:
        self._change(lambda results: [r for r in results if r.id not in chosen])

    def star(self, chosen: Sequence[str]) -> None:
        """Star the chosen results, or take the star away."""

        def turned(result: Result) -> Result:
            return replace(result, starred=result.starred != (result.id in chosen))

        self._change(lambda results: list(map(turned, results)))

    def _change(self, change: Callable[[list[Result]], list[Result]]) -> None:
        # Read anew: another notebook may have added something, and none may do so meanwhile.
        with self._lock, locked(self.path.parent):
            results = change(self.read())
            plain = [r for r in results if not r.starred]
            spare = {r.id for r in plain[: max(0, len(plain) - KEPT)]}
            lines = [json.dumps(asdict(r), ensure_ascii=True) for r in results if r.id not in spare]
            write_whole(self.path, "[\n" + ",\n".join(lines) + "\n]\n")
