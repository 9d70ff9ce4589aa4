"""The command line: one command a verb of the package.

Exit codes: 0; 1 an error, or `check`, `verify` or `diagnose` found something; 2 wrong usage; 130
interrupted.
With `--json`, standard output is exactly one JSON object, also on error. Answers and tables go
to standard output, everything else to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import llamalab

from .. import catalog
from ..errors import LabError, LabWarning, UsageError
from ..reports import paint, painted
from ..units import parse_size


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
    except LabError as found:
        error = found
    if as_json:
        print(json.dumps(error.as_dict(), ensure_ascii=False))
    else:
        print(f"{paint('error', 31, sys.stderr)}: {error}", file=sys.stderr)
    return error.exit_code


_plain_warning = warnings.showwarning


def _show_warning(message, category, *arguments, **more) -> None:
    if issubclass(category, LabWarning):
        print(f"{paint('warning', 33, sys.stderr)}: {message}", file=sys.stderr)
    else:
        _plain_warning(message, category, *arguments, **more)


def _field_spelling(arguments: list[str]) -> list[str]:
    """Turn `--base_model`, the spelling of the field's scripts, into `--base-model`."""
    return [
        re.sub(r"^--[a-z0-9_]+", lambda match: match[0].replace("_", "-"), item)
        for item in arguments
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{self.prog}: {message}.", "", f"See '{self.prog} --help'.")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = _Parser(
        prog="llamalab",
        description="From Meta's LLaMA files to a Chinese-speaking model, one checked step a time.",
        epilog="Options may be written with underscores too, as in --base_model.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"llamalab {llamalab.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(command=function, verb=name)
        return added

    def places(added) -> None:
        added.add_argument("--models-dir", default="", metavar="DIR", help="default: models")

    def as_json(added) -> None:
        added.add_argument("--json", action="store_true", help="print one JSON object")

    added = command("check", _report, "Check this machine, and what a model will need of it.")
    added.add_argument("--model", metavar="NAME", help="a model of the catalogue")
    places(added)
    as_json(added)

    added = command("models", _models, "List the models and parts of the catalogue.")
    as_json(added)

    added = command("download", _download, "Bring a model's parts, verified, to their places.")
    added.add_argument("name", metavar="NAME", help="a model or a part of the catalogue")
    places(added)
    added.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="[PART=]WHERE",
        help="a URL, hf:OWNER/REPO[@REVISION] or a directory; may be given several times",
    )
    added.add_argument(
        "--connections",
        type=int,
        choices=range(1, 17),
        default=4,
        metavar="N",
        help="1 to 16 at once for a large file; default 4",
    )

    added = command(
        "verify", _report, "Compare every file of a directory with what is known of it."
    )
    added.add_argument("path", metavar="PATH", help="a directory, or a part's name")
    added.add_argument("--as", dest="as_name", metavar="NAME", help="the part it should be")
    compared = added.add_mutually_exclusive_group()
    compared.add_argument("--against", metavar="PATH", help="another directory to compare it with")
    compared.add_argument(
        "--fix", action="store_true", help="move misplaced files to their places, and say which"
    )
    places(added)
    as_json(added)

    def making(added) -> None:
        added.add_argument(
            "--model-size", metavar="7B", help="the size folder, if there are several"
        )
        added.add_argument("--output-dir", required=True, metavar="OUT")
        added.add_argument("--max-shard-size", default="2GB", metavar="2GB")
        added.add_argument("--context-length", type=positive, metavar="N")
        added.add_argument("--overwrite", action="store_true", help="replace what is in OUT")
        places(added)

    added = command("convert", _convert, "Convert a base model from Meta layout to HF layout.")
    added.add_argument("--input-dir", required=True, metavar="DIR", help="Meta's files")
    making(added)

    added = command("merge", _make, "Merge adapters into a base model, in Meta or HF layout.")
    added.add_argument("--base-model", required=True, metavar="M")
    added.add_argument("--lora-model", required=True, metavar="A[,B]", help="in merging order")
    added.add_argument("--output-type", default="huggingface", choices=["huggingface", "pth"])
    making(added)

    added = command("generate", _generate, "Answer prompts; standard output is the answer only.")
    added.add_argument("--base-model", required=True, metavar="M")
    added.add_argument("--lora-model", metavar="A[,B]", help="adapters that are not merged yet")
    asked = added.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT")
    asked.add_argument("--interactive", action="store_true", help="talk with the model")
    asked.add_argument("--data-file", metavar="F", help="a prompt a line, or .jsonl with 'prompt'")
    added.add_argument(
        "--predictions-file", metavar="F", help="where the answers to --data-file go, as JSON Lines"
    )
    added.add_argument(
        "--batch-size", type=positive, metavar="N", help="prompts of --data-file at once"
    )
    added.add_argument(
        "--on", metavar="ray", help="ray, or ray://HOST:PORT: answer --data-file there"
    )
    added.add_argument(
        "--with-prompt", action="store_true", help="put the alpaca template around each prompt"
    )
    added.add_argument("--temperature", type=float, default=0.2, help="0 is greedy; default 0.2")
    added.add_argument("--top-p", type=float, default=0.9, help="default 0.9")
    added.add_argument("--top-k", type=int, default=40, help="default 40")
    added.add_argument("--repetition-penalty", type=float, default=1.1, help="default 1.1")
    added.add_argument("--max-new-tokens", type=positive, default=400, help="default 400")
    added.add_argument("--seed", type=int, metavar="N")
    added.add_argument("--stop", action="append", default=[], metavar="S", help="ends the answer")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    added.add_argument("--only-cpu", dest="device", action="store_const", const="cpu")
    added.add_argument("--gpus", metavar="0", help="the GPUs to be seen, by number")
    added.add_argument("--dtype", default="auto", help="auto, float16, bfloat16 or float32")
    added.add_argument("--quantize", choices=["8bit", "4bit"], help="less memory, less exact")
    for bits in ("8bit", "4bit"):
        added.add_argument(
            f"--load-in-{bits}",
            dest="quantize",
            action="store_const",
            const=bits,
            help=f"as --quantize {bits}",
        )
    added.add_argument("--tokenizer-path", metavar="DIR", help="in place of the model's own")
    added.add_argument("--force", action="store_true", help="allow an adapter applied twice")
    added.add_argument("--show-settings", action="store_true", help="tell every one in effect")
    places(added)

    added = command("diagnose", _report, "Find what makes the answers of a model meaningless.")
    added.add_argument("--base-model", required=True, metavar="M")
    added.add_argument("--lora-model", metavar="A[,B]", help="adapters, in order")
    asked = added.add_mutually_exclusive_group()
    asked.add_argument(
        "--with-prompt",
        action="store_true",
        default=None,
        help="prompts stand inside the alpaca template",
    )
    asked.add_argument(
        "--without-prompt", dest="with_prompt", action="store_false", help="they do not"
    )
    added.add_argument("--prompt", default="", metavar="TEXT", help="does it fit the context?")
    added.add_argument("--quick", action="store_true", help="look at headers and embeddings only")
    added.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    places(added)
    as_json(added)

    added = command("export", _make, "Write a model as one file for llama.cpp.")
    added.add_argument("--model", required=True, metavar="M", help="in Meta or HF layout")
    added.add_argument("--lora-model", metavar="A[,B]", help="adapters that are not merged yet")
    added.add_argument("--model-size", metavar="7B", help="the size folder, if there are several")
    added.add_argument("--to", required=True, choices=["gguf"])
    added.add_argument("--output", required=True, metavar="FILE")
    added.add_argument("--type", default="f16", choices=["f16", "q8_0"], help="default f16")
    added.add_argument("--context-length", type=positive, metavar="N")
    added.add_argument("--overwrite", action="store_true", help="replace another GGUF file")
    places(added)

    for point in entry_points(group="llamalab.commands"):
        point.load()(command)
    return parser


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


def _call(options):
    """Call the package's function of the command's name; the options are its arguments."""
    given = vars(options).items()
    arguments = {name: value for name, value in given if name not in ("command", "verb", "json")}
    return getattr(llamalab, options.verb)(**arguments)


def _report(options) -> int:
    """Print a report of rows with a status each; exit code 1 when it found something."""
    report = _call(options)
    if options.json:
        print(json.dumps(report.as_dict(), ensure_ascii=False))
    else:
        print(painted(report, sys.stdout))
    return 0 if report.ok else 1


def _make(options) -> int:
    print(_call(options))
    return 0


def _models(options) -> int:
    from ..catalog import needs
    from ..units import size_text

    rows = []
    for model in catalog.models().values():
        need = needs(model)
        rows.append(
            {
                "name": model.name,
                "family": model.family,
                "parts": [part.name for part in model.parts],
                "download": need.download,
                "memory": need.inference_memory,
            }
        )
    if options.json:
        print(json.dumps({"models": rows, "parts": list(catalog.parts())}))
        return 0
    print(f"{'model':26} {'family':7} {'download':>9} {'memory':>9}  parts")
    for row in rows:
        sizes = (size_text(row["download"]), size_text(row["memory"]))
        print("{name:26} {family:7} {:>9} {:>9}  ".format(*sizes, **row) + " + ".join(row["parts"]))
    return 0


def _download(options) -> int:
    for directory in _call(options):
        print(directory)
    return 0


def _convert(options) -> int:
    from ..catalog import locate

    # A part's name is looked up as for a model; anything like a path is only a path.
    given = options.input_dir
    if "/" not in given and not Path(given).is_dir():
        options.input_dir = locate(given, options.models_dir)
    del options.models_dir
    return _make(options)


def _generate(options) -> int:
    if bool(options.data_file) != bool(options.predictions_file):
        raise UsageError("--data-file and --predictions-file belong together.")
    if options.on and not options.data_file:
        raise UsageError("--on is for the prompts of a --data-file.")
    if options.gpus is not None:  # before PyTorch is loaded, which looks at it once
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpus
    from ..inference import check_seed, effective, load

    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "stop")
    settings = {name: getattr(options, name) for name in names}
    settings["template"] = "alpaca" if options.with_prompt else "none"
    settings = effective(settings)  # a wrong one is said before minutes of loading
    check_seed(options.seed or 0)
    if options.data_file:
        from ..inference import read_prompts

        read_prompts(options.data_file)
    names = ("base_model", "lora_model", "device", "dtype", "quantize", "tokenizer_path")
    how = {name: getattr(options, name) for name in (*names, "models_dir", "force")}
    if options.on:
        (answering,) = entry_points(group="llamalab.answering", name="ray")
        with answering.load()(options.on, how) as (model, answer):
            return _predict(model, settings, options, answer)
    model = load(**how)
    if options.interactive and model.family == "alpaca":
        settings["template"] = "alpaca"  # outside of it the family does not follow instructions
    if options.show_settings:
        dtype = str(model.network.dtype).removeprefix("torch.")
        told = settings | {"seed": options.seed, "device": str(model.device), "dtype": dtype}
        print(json.dumps(told, ensure_ascii=False), file=sys.stderr)
    if options.interactive:
        from ..inference import Chat, talk

        talk(Chat(model, settings | {"seed": options.seed}))
        return 0
    if options.data_file:
        return _predict(model, settings, options)
    on_terminal = sys.stdout.isatty()
    answer = model.generate(
        options.prompt,
        seed=options.seed,
        on_text=(lambda text: print(text, end="", flush=True)) if on_terminal else None,
        **settings,
    )
    print("" if on_terminal else answer.text.strip())
    if options.seed is None and options.temperature > 0:
        print(f"seed {answer.seed}", file=sys.stderr)
    return 0


def _predict(model, settings: dict, options, answer=None) -> int:
    from ..inference import predict

    origin = {name: getattr(options, name) for name in ("base_model", "lora_model", "quantize")}
    origin["dtype"] = str(model.network.dtype).removeprefix("torch.")
    done = predict(
        model,
        options.data_file,
        options.predictions_file,
        settings=settings,
        seed=options.seed,
        origin=origin,
        batch_size=options.batch_size,
        answer=answer,
    )
    print(done, file=sys.stderr)
    return 0
