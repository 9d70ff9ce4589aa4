"""The errors a user can meet: each says what happened, why, and what to do next.

The command line prints these three sentences to standard error, without a traceback,
and exits with `exit_code`; with `--json` it prints `as_dict()` on standard output.
"""

import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """A fault that has a name, as `findings.toml` explains it; that file says what each field is."""

    symptom: str
    cause: str
    fix: str
    command: str


@cache
def findings() -> dict[str, Finding]:
    """Return every finding by name, in the order in which a reader should look for it."""
    file = Path(__file__).with_name("findings.toml")
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: Finding(**entry) for name, entry in table.items()}


class LabError(Exception):
    """Base of every error that llamalab raises on purpose.

    Args:
        what: one sentence, what happened; it names the file, tensor or option.
        why: one sentence, the likely reason; that of the finding, if none is given.
        fix: one sentence, what to do next, a command where there is one; likewise.
        finding: the name under which `findings.toml` explains this error, if it does.
    """

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "", *, finding: str = ""):
        super().__init__(what)
        if finding:
            why, fix = why or findings()[finding].cause, fix or findings()[finding].fix
        self.what, self.why, self.fix, self.finding = what, why, fix, finding

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.fix) if part)

    def as_dict(self) -> dict[str, str]:
        return {"error": type(self).__name__, "what": self.what, "why": self.why, "fix": self.fix}


class LabWarning(UserWarning):
    """One sentence on what makes answers meaningless, though nothing fails."""


class UsageError(LabError):
    """The command or call is not spelt right; nothing was read or written."""

    exit_code = 2


class NotFound(LabError):
    """A file, directory or catalogue name that does not exist."""


class WrongLayout(LabError):
    """The files are there, but not in the layout that this step reads."""


class DamagedFile(LabError):
    """A file whose bytes are not what its format, size or digest promises."""


class Incompatible(LabError):
    """Parts that are sound one by one and do not belong together."""


class OutputExists(LabError):
    """The output directory holds something that was not made from these inputs."""


class OutOfDate(OutputExists):
    """What llamalab made there is damaged, or an input has changed since; it can be made anew."""


class NotEnoughRoom(LabError):
    """Too little memory or disk for the step, by the arithmetic in the message."""


class DownloadFailed(LabError):
    """The bytes could not be fetched; what has arrived is kept for the next try."""
