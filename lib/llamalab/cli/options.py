"""What several commands' options share: their types, and the groups that go together."""

import argparse
from pathlib import Path

from ..errors import UsageError
from ..inference import settings
from ..units import parse_size


class Parser(argparse.ArgumentParser):
    """A parser that raises what the program prints, and knows no abbreviations."""

    def __init__(self, **more):
        super().__init__(allow_abbrev=False, **more)

    def error(self, message: str):
        raise UsageError(f"{self.prog}: {message}.", "", f"See '{self.prog} --help'.")


def size(text: str) -> int:
    """Return bytes for "4GB", as an option's type."""
    try:
        return parse_size(text)
    except UsageError:
        raise argparse.ArgumentTypeError(f"'{text}' is no size such as 4GB or 500MB") from None


def positive(text: str) -> int:
    """Return a whole number above 0, as an option's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return int(text)


def directory(text: str) -> str:
    """Return a path from the current directory, as a shell's user means it."""
    return str(Path(text).expanduser().absolute()) if text else ""


def add_models_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models-dir", type=directory, default="", metavar="DIR", help="default: models"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def add_base_and_adapters(parser: argparse.ArgumentParser, name: str = "--base-model") -> None:
    parser.add_argument(name, required=True, metavar="M", help="in Meta or HF layout")
    parser.add_argument("--lora-model", metavar="A[,B]", help="adapters to merge, in order")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add what convert and merge ask about their output directory."""
    parser.add_argument("--output-dir", required=True, metavar="OUT")
    parser.add_argument("--max-shard-size", default="2GB", metavar="2GB")
    parser.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
    add_shape(parser)


def add_shape(parser: argparse.ArgumentParser) -> None:
    """Add what Meta's files leave open."""
    parser.add_argument("--model-size", metavar="7B", help="the size folder, if there are several")
    parser.add_argument("--context-length", type=positive, metavar="N")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add an option for each setting of `Sampling` that is a number, and --stop."""
    for name, setting in settings().items():
        kind = positive if setting.low == 1 else setting.type
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=setting.default,
            metavar="N" if setting.type is int else "X",
            help=f"{setting.help}; default {setting.default}",
        )
    parser.add_argument("--stop", action="append", default=[], metavar="S", help="ends the answer")
