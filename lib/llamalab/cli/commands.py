"""The commands: for each its options, and what it does with them.

The options of a command are the arguments of the package's function of the same name. Other
distributions add commands by the entry point group `llamalab.commands`.
"""

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import llamalab

from .. import catalog
from ..errors import UsageError
from ..reports import painted
from ..units import size_text
from . import options as add
from .options import Parser, positive


def build_parser() -> Parser:
    """Return the parser of every command."""
    parser = Parser(
        prog="llamalab",
        description="From Meta's LLaMA files to a Chinese-speaking model, one checked step a time.",
        epilog="Options may be written with underscores too, as in --base_model.",
    )
    parser.add_argument("--version", action="version", version=f"llamalab {llamalab.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(name: str, function: Callable, text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function, verb=name)
        return added

    _add_check(command("check", _report, "Check this machine, and what a model will need of it."))
    add.add_json(command("models", _models, "List the models and parts of the catalogue."))
    text = "Bring a model's parts, verified, to their places."
    _add_download(command("download", _download, text))
    text = "Compare every file of a directory with what is known of it."
    _add_verify(command("verify", _report, text))
    text = "Convert a base model from Meta layout to HF layout."
    _add_convert(command("convert", _convert, text))
    _add_merge(command("merge", _make, "Merge adapters into a base model, in Meta or HF layout."))
    text = "Answer prompts; standard output is the answer only."
    _add_generate(command("generate", _generate, text))
    text = "Find what makes the answers of a model meaningless."
    _add_diagnose(command("diagnose", _report, text))
    _add_export(command("export", _make, "Write a model as one file for llama.cpp."))
    for point in entry_points(group="llamalab.commands"):
        point.load()(command)
    return parser


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


def _add_check(parser: Parser) -> None:
    parser.add_argument("--model", metavar="NAME", help="a model of the catalogue")
    add.add_models_dir(parser)
    add.add_json(parser)


def _models(options) -> int:
    rows = []
    for model in catalog.models().values():
        need, parts = catalog.needs(model), [part.name for part in model.parts]
        row = {"name": model.name, "family": model.family, "parts": parts}
        rows.append(row | {"download": need.download, "memory": need.inference_memory})
    if options.json:
        print(json.dumps({"models": rows, "parts": list(catalog.parts())}))
        return 0
    print(f"{'model':26} {'family':7} {'download':>9} {'memory':>9}  parts")
    for row in rows:
        sizes = (size_text(row["download"]), size_text(row["memory"]))
        print("{name:26} {family:7} {:>9} {:>9}  ".format(*sizes, **row) + " + ".join(row["parts"]))
    return 0


def _add_download(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="a model or a part of the catalogue")
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="[PART=]WHERE",
        help="a URL, hf:OWNER/REPO[@REVISION] or a directory; may be given several times",
    )
    parser.add_argument(
        "--connections",
        type=int,
        choices=range(1, 17),
        default=4,
        metavar="N",
        help="1 to 16 at once for a large file; default 4",
    )
    add.add_models_dir(parser)


def _download(options) -> int:
    for directory in _call(options):
        print(directory)
    return 0


def _add_verify(parser: Parser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory, or a part's name")
    parser.add_argument("--as", dest="as_name", metavar="NAME", help="the part it should be")
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument("--against", metavar="PATH", help="another directory to compare it with")
    compared.add_argument(
        "--fix", action="store_true", help="move misplaced files to their places, and say which"
    )
    add.add_models_dir(parser)
    add.add_json(parser)


def _add_convert(parser: Parser) -> None:
    parser.add_argument("--input-dir", required=True, metavar="DIR", help="Meta's files")
    add.add_output(parser)
    add.add_models_dir(parser)


def _convert(options) -> int:
    # A part's name is looked up as for a model; anything like a path is only a path.
    given = options.input_dir
    if "/" not in given and not Path(given).is_dir():
        options.input_dir = catalog.locate(given, options.models_dir)
    del options.models_dir
    return _make(options)


def _add_merge(parser: Parser) -> None:
    parser.add_argument("--base-model", required=True, metavar="M")
    parser.add_argument("--lora-model", required=True, metavar="A[,B]", help="in merging order")
    parser.add_argument("--output-type", default="huggingface", choices=["huggingface", "pth"])
    add.add_output(parser)
    add.add_models_dir(parser)


def _add_diagnose(parser: Parser) -> None:
    add.add_base_and_adapters(parser)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--with-prompt",
        action="store_true",
        default=None,
        help="prompts stand inside the alpaca template",
    )
    asked.add_argument(
        "--without-prompt", dest="with_prompt", action="store_false", help="they do not"
    )
    parser.add_argument("--prompt", default="", metavar="TEXT", help="does it fit the context?")
    parser.add_argument("--quick", action="store_true", help="look at headers and embeddings only")
    add.add_device(parser)
    add.add_models_dir(parser)
    add.add_json(parser)


def _add_export(parser: Parser) -> None:
    add.add_base_and_adapters(parser, "--model")
    parser.add_argument("--to", required=True, choices=["gguf"])
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--type", default="f16", choices=["f16", "q8_0"], help="default f16")
    parser.add_argument("--overwrite", action="store_true", help="replace another GGUF file")
    add.add_shape(parser)
    add.add_models_dir(parser)


def _add_generate(parser: Parser) -> None:
    add.add_base_and_adapters(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT")
    asked.add_argument("--interactive", action="store_true", help="talk with the model")
    asked.add_argument("--data-file", metavar="F", help="a prompt a line, or .jsonl with 'prompt'")
    parser.add_argument(
        "--predictions-file", metavar="F", help="where the answers to --data-file go, as JSON Lines"
    )
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="prompts of --data-file at once"
    )
    parser.add_argument(
        "--on", metavar="ray", help="ray, or ray://HOST:PORT: answer --data-file there"
    )
    parser.add_argument(
        "--with-prompt", action="store_true", help="put the alpaca template around each prompt"
    )
    add.add_sampling(parser)
    parser.add_argument("--seed", type=int, metavar="N")
    add.add_device(parser)
    parser.add_argument("--only-cpu", dest="device", action="store_const", const="cpu")
    parser.add_argument("--gpus", metavar="0", help="the GPUs to be seen, by number")
    parser.add_argument("--dtype", default="auto", help="auto, float16, bfloat16 or float32")
    parser.add_argument("--quantize", choices=["8bit", "4bit"], help="less memory, less exact")
    for bits in ("8bit", "4bit"):  # as the field's scripts have it
        parser.add_argument(f"--load-in-{bits}", dest="quantize", action="store_const", const=bits)
    parser.add_argument("--tokenizer-path", metavar="DIR", help="in place of the model's own")
    parser.add_argument("--force", action="store_true", help="allow an adapter applied twice")
    parser.add_argument("--show-settings", action="store_true", help="tell every one in effect")
    add.add_models_dir(parser)


def _generate(options) -> int:
    if bool(options.data_file) != bool(options.predictions_file):
        raise UsageError("--data-file and --predictions-file belong together.")
    if options.on and not options.data_file:
        raise UsageError("--on is for the prompts of a --data-file.")
    if options.gpus is not None:  # before PyTorch is loaded, which looks at it once
        os.environ["CUDA_VISIBLE_DEVICES"] = options.gpus
    from ..inference import Sampling, check_seed, load, read_prompts, settings

    # What is wrong with an option is said before minutes of loading.
    given = {name: getattr(options, name) for name in (*settings(), "stop")}
    sampling = Sampling(**given, template="alpaca" if options.with_prompt else "none")
    check_seed(options.seed or 0)
    if options.data_file:
        read_prompts(options.data_file)
    names = ("base_model", "lora_model", "device", "dtype", "quantize", "tokenizer_path")
    parts = {name: getattr(options, name) for name in (*names, "models_dir", "force")}
    if options.on:
        (point,) = entry_points(group="llamalab.answering", name="ray")
        with point.load()(options.on, parts) as (model, answer):
            return _predict(model, sampling, options, answer)
    model = load(**parts)
    if options.data_file:
        return _predict(model, sampling, options)
    if options.interactive:
        return _talk(model, sampling, options)
    return _answer(model, sampling, options)


def _show_settings(model, sampling, options) -> None:
    if options.show_settings:
        dtype = str(model.network.dtype).removeprefix("torch.")
        run = {"seed": options.seed, "device": str(model.device), "dtype": dtype}
        settings = sampling.normalised().as_dict() | run
        print(json.dumps(settings, ensure_ascii=False), file=sys.stderr)


def _answer(model, sampling, options) -> int:
    """Answer one prompt; on a terminal the answer is seen to grow."""
    _show_settings(model, sampling, options)
    on_terminal = sys.stdout.isatty()
    answer = model.generate(
        options.prompt,
        seed=options.seed,
        on_text=(lambda text: print(text, end="", flush=True)) if on_terminal else None,
        **sampling.as_dict(),
    )
    print("" if on_terminal else answer.text.strip())
    if options.seed is None and sampling.temperature > 0:
        print(f"seed {answer.seed}", file=sys.stderr)
    return 0


def _talk(model, sampling, options) -> int:
    from dataclasses import replace

    from ..inference import Chat, talk

    if model.family == "alpaca":  # outside its template it does not follow instructions
        sampling = replace(sampling, template="alpaca")
    _show_settings(model, sampling, options)
    talk(Chat(model, sampling, options.seed))
    return 0


def _predict(model, sampling, options, answer=None) -> int:
    from ..inference import predict

    _show_settings(model, sampling, options)
    origin = {name: getattr(options, name) for name in ("base_model", "lora_model", "quantize")}
    origin["dtype"] = str(model.network.dtype).removeprefix("torch.")
    done = predict(
        model,
        options.data_file,
        options.predictions_file,
        sampling=sampling,
        seed=options.seed,
        origin=origin,
        batch_size=options.batch_size,
        answer=answer,
    )
    print(done, file=sys.stderr)
    return 0
