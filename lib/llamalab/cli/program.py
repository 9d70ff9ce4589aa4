"""The program `llamalab`: it reads one command, carries it out, and says how that ended.

Exit codes: 0; 1 an error, or `check`, `verify` or `diagnose` found something; 2 wrong usage; 130
interrupted.
With `--json`, standard output is exactly one JSON object, also on error. Answers and tables go
to standard output, everything else to standard error.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Sequence

from ..errors import LabError, LabWarning
from ..reports import BAD, DOUBT, paint
from .commands import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    warnings.showwarning = _show_warning
    try:
        options = build_parser().parse_args(_field_spelling(arguments))
        return options.command(options)
    except KeyboardInterrupt:
        print(
            "\nInterrupted. What is finished is kept; the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as refusal:  # a full disk, a directory that may not be written
        what = f"{refusal.strerror or refusal}: {refusal.filename or ''}".rstrip(": ")
        error = LabError(f"The system refused: {what}.")
    except LabError as raised:
        error = raised
    if as_json:
        print(json.dumps(error.as_dict(), ensure_ascii=False))
    else:
        print(f"{paint('error', BAD, sys.stderr)}: {error}", file=sys.stderr)
    return error.exit_code


_plain_warning = warnings.showwarning


def _show_warning(message, category, *arguments, **more) -> None:
    if issubclass(category, LabWarning):
        print(f"{paint('warning', DOUBT, sys.stderr)}: {message}", file=sys.stderr)
    else:
        _plain_warning(message, category, *arguments, **more)


def _field_spelling(arguments: list[str]) -> list[str]:
    """Turn `--base_model`, the spelling of the field's scripts, into `--base-model`."""
    return [
        re.sub(r"^--[a-z0-9_]+", lambda match: match[0].replace("_", "-"), item)
        for item in arguments
    ]
