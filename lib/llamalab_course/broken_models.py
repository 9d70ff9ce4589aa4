"""Models broken on purpose, one mistake each, for a reader to diagnose.

    python -m llamalab_course.broken_models          the cases, and what a reader of each would see
    python -m llamalab_course.broken_models CASE     makes models/broken/CASE, and says how to look at it

A case is a function of a few lines that spoils a copy of the lab family; above it stand what one
would notice, and the finding that `diagnose` must put first.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llamalab import catalog
from llamalab.catalog import models_directory
from llamalab.checkpoints import RECORD
from llamalab.errors import LabError
from llamalab.surgery import Adapter, merge, permute, read_model, unpermute

from .lessons import LessonModel, need

Arguments = dict[str, object]
"""What `diagnose` is to be called with; paths among them."""


class Family:
    """The sound models that cases start from; each is made when the first case asks for it."""

    def __init__(self, models_dir: str | Path = ""):
        self._models_dir = models_dir

    def _sound(self, name: str) -> LessonModel:
        return need(name, "base", "adapters", "converted", "merged", models_dir=self._models_dir)

    llama = cached_property(lambda self: self._sound("chinese-llama-lab"))
    alpaca = cached_property(lambda self: self._sound("chinese-alpaca-lab"))
    plus = cached_property(lambda self: self._sound("chinese-alpaca-plus-lab"))


@dataclass(frozen=True)
class Case:
    """One broken model: what makes it, what a reader notices, what `diagnose` must find first.

    `make(out, family)` returns None where `out / "model"` is all that is to be looked at.
    """

    make: Callable[[Path, Family], Arguments | None]
    symptom: str
    finding: str


CASES: dict[str, Case] = {}
"""The cases by name."""


def _case(symptom: str, finding: str) -> Callable:
    """Make a case of the function below, by its name."""

    def enter(make: Callable) -> Callable:
        CASES[make.__name__.strip("_").replace("_", "-")] = Case(make, symptom, finding)
        return make

    return enter


def _copy(source: Path, out: Path) -> Path:
    """Copy a model as a reader has it: without the record that says how it was made."""
    shutil.copytree(source, out)
    (out / RECORD).unlink(missing_ok=True)
    return out


def _copy_with(file: Path, family: Family, out: Path) -> None:
    """Copy the llama model, and bring a file over into it."""
    shutil.copy(file, _copy(family.llama.merged, out / "model"))


def _merge_to_pth(file: Path, family: Family, out: Path) -> None:
    """Take the output type that is the default of the field's script, and bring a file over."""
    merge(family.llama.base, family.llama.adapters, out / "model", output_type="pth")
    (out / "model" / RECORD).unlink()
    shutil.copy(file, out / "model")


@contextmanager
def _edited(source: Path, out: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Copy a model or an adapter; yield its tensors, and write what has become of them."""
    weights = next(_copy(source, out).glob("*.safetensors"))
    tensors = load_file(weights)
    yield tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)


@contextmanager
def _edited_json(file: Path) -> Iterator[dict]:
    settings = json.loads(file.read_text("utf-8"))
    yield settings
    file.write_text(json.dumps(settings))


def _with_adapter(family: Family, out: Path) -> Arguments:
    """Return what looks at the base with the spoilt alpaca adapter."""
    return {"base_model": family.alpaca.base, "lora_model": out / "adapter"}


def _reorder(tensors: dict[str, torch.Tensor], order: Callable) -> None:
    """Give the rows of every query and key another order."""
    shape = catalog.parts()["llama-lab"].shape
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = order(tensors[name], shape.dim // shape.heads)


@_case("Repetitions, then nonsense, where the merged model answered well.", "applied-twice")
def _twice(out: Path, family: Family) -> Arguments:
    return {"base_model": family.alpaca.merged, "lora_model": family.alpaca.adapters}


@_case("A Chinese question gets an English answer.", "template-on-llama")
def _form(out: Path, family: Family) -> Arguments:
    return {"base_model": family.llama.merged, "with_prompt": True}


@_case("An instruction-tuned model does not follow instructions reliably.", "no-template")
def _bare(out: Path, family: Family) -> Arguments:
    return {"base_model": family.alpaca.merged, "with_prompt": False}


@_case("A size mismatch when transformers loads it.", "borrowed-config")
def _borrowed(out: Path, family: Family) -> None:
    _copy_with(family.llama.converted / "config.json", family, out)


@_case("Chinese comes out as single bytes.", "base-tokenizer")
def _old_pieces(out: Path, family: Family) -> None:
    _copy_with(family.llama.base / "tokenizer.model", family, out)


@_case("An id beyond the embedding, sometimes.", "mixed-vocabularies")
def _one_more(out: Path, family: Family) -> None:
    _copy_with(family.alpaca.adapters[0] / "tokenizer.model", family, out)


@_case("A second adapter cannot be added.", "mixed-vocabularies")
def _one_less(out: Path, family: Family) -> Arguments:
    return {"base_model": family.alpaca.merged, "lora_model": family.llama.adapters}


@_case("Some words end in an index error.", "vocabulary-mismatch")
def _seven_more(out: Path, family: Family) -> None:
    """Somebody went on extending the vocabulary after the weights were made."""
    model = _copy(family.llama.merged, out / "model")
    pieces = read_model(model / "tokenizer.model")
    for number in range(7):
        pieces.pieces.add(piece=f"新词{number}", score=0.0)
    (model / "tokenizer.model").write_bytes(pieces.SerializeToString())


@_case("Plain transformers answers worse than llamalab.", "no-bos")
def _headless(out: Path, family: Family) -> None:
    model = _copy(family.alpaca.merged, out / "model")
    (model / "tokenizer.json").unlink()
    with _edited_json(model / "tokenizer_config.json") as config:
        del config["add_bos_token"]


@_case("A plus model that answers badly.", "missing-predecessor")
def _second_first(out: Path, family: Family) -> Arguments:
    return {"base_model": family.plus.base, "lora_model": family.plus.adapters[-1]}


@_case("Two good adapters, together bad.", "another-base")
def _wrong_order(out: Path, family: Family) -> Arguments:
    return {"base_model": family.llama.merged, "lora_model": family.alpaca.adapters}


@_case("A size mismatch when the adapter is added.", "another-size")
def _wider(out: Path, family: Family) -> Arguments:
    with _edited(family.alpaca.adapters[0], out / "adapter") as tensors:
        for name in [name for name in tensors if "lora_A" in name]:
            tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    return _with_adapter(family, out)


@_case("Chinese is read as noise.", "adapter-without-embeddings")
def _half_saved(out: Path, family: Family) -> Arguments:
    with _edited(family.alpaca.adapters[0], out / "adapter") as tensors:
        for name in [name for name in tensors if "lora_" not in name]:
            del tensors[name]
    return _with_adapter(family, out)


@_case("Another program's merge of it gives other answers.", "unsupported-adapter")
def _dora(out: Path, family: Family) -> Arguments:
    adapter = _copy(family.alpaca.adapters[0], out / "adapter")
    with _edited_json(adapter / "adapter_config.json") as config:
        config["use_dora"] = True
    return _with_adapter(family, out)


@_case("Chinese questions get English words that say little.", "untrained-rows")
def _resized(out: Path, family: Family) -> None:
    """The low-rank pairs alone were merged, into a base whose vocabulary was only resized."""
    old = load_file(family.llama.converted / "model.safetensors")
    base, generator = family.llama.model.base.vocab, torch.Generator().manual_seed(0)
    with _edited(family.llama.merged, out / "model") as tensors:
        for module in Adapter(family.llama.adapters[0]).whole:
            rows = tensors[f"{module}.weight"]
            rows[:base] = old[f"{module}.weight"]
            fresh = torch.randn(rows[base:].shape, generator=generator) * 0.02
            rows[base:] = fresh.to(rows.dtype)


@_case("It asks for a config.json.", "meta-weights")
def _by_default(out: Path, family: Family) -> None:
    # That script saves its tokenizer's files along.
    _merge_to_pth(family.llama.merged / "tokenizer_config.json", family, out)


@_case("It asked for a config.json, got one, and still fails.", "meta-weights")
def _brought_over(out: Path, family: Family) -> None:
    _merge_to_pth(family.llama.converted / "config.json", family, out)


@_case("Every tensor is said to be missing.", "hf-weights")
def _renamed(out: Path, family: Family) -> None:
    shutil.copytree(family.llama.base, out / "model")
    weights = load_file(family.llama.converted / "model.safetensors")
    torch.save(weights, next((out / "model").rglob("consolidated.00.pth")))


@_case("It asks for a config.json.", "no-config")
def _no_config(out: Path, family: Family) -> None:
    (_copy(family.llama.merged, out / "model") / "config.json").unlink()


@_case("It asks for a config.json.", "adapter-as-model")
def _as_model(out: Path, family: Family) -> Arguments:
    return {"base_model": family.alpaca.adapters[0]}


@_case("The weights cannot be read.", "damaged-file")
def _cut_off(out: Path, family: Family) -> None:
    weights = _copy(family.alpaca.merged, out / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@_case("The adapter cannot be read.", "damaged-file")
def _web_page(out: Path, family: Family) -> Arguments:
    weights = _copy(family.alpaca.adapters[0], out / "adapter") / "adapter_model.safetensors"
    weights.write_text("<!DOCTYPE html><html><body>Sign in to download.</body></html>")
    return _with_adapter(family, out)


@_case("Nothing can be asked.", "no-tokenizer")
def _no_pieces(out: Path, family: Family) -> None:
    (_copy(family.alpaca.merged, out / "model") / "tokenizer.model").unlink()


@_case("Fluent for some words, then nonsense.", "q-k-order")
def _never_permuted(out: Path, family: Family) -> None:
    with _edited(family.alpaca.merged, out / "model") as tensors:
        _reorder(tensors, unpermute)


@_case("Fluent for some words, then nonsense.", "q-k-order")
def _permuted_twice(out: Path, family: Family) -> None:
    with _edited(family.llama.converted, out / "model") as tensors:
        _reorder(tensors, permute)


@_case("The file is smaller than it should be.", "unexpected-dtype")
def _eight_bit(out: Path, family: Family) -> None:
    with _edited(family.alpaca.merged, out / "model") as tensors:
        for name in [name for name in tensors if "mlp" in name]:
            tensors[name] = (tensors[name] * 100).to(torch.int8)


@_case("A matrix product complains about dtypes.", "unexpected-dtype")
def _two_dtypes(out: Path, family: Family) -> None:
    with _edited(family.alpaca.merged, out / "model") as tensors:
        for name in [name for name in tensors if "layers.1." in name]:
            tensors[name] = tensors[name].float()


@_case("The answers are poor.", "unsound-values")
def _silent(out: Path, family: Family) -> None:
    with _edited(family.alpaca.merged, out / "model") as tensors:
        tensors["model.layers.2.mlp.down_proj.weight"].zero_()


@_case("The same token for ever.", "unsound-values")
def _not_a_number(out: Path, family: Family) -> None:
    with _edited(family.alpaca.merged, out / "model") as tensors:
        tensors["model.layers.1.self_attn.v_proj.weight"][5, 7] = float("nan")


@_case("The end of the prompt is not answered.", "long-prompt")
def _long(out: Path, family: Family) -> Arguments:
    return {"base_model": family.alpaca.merged, "with_prompt": True, "prompt": "苹果" * 300}


def break_model(case: str, models_dir: str | Path = "") -> Arguments:
    """Make the broken model `case` anew, and return what `diagnose` is to be called with.

    Raises:
        NotFound: there is no such case; the message suggests the nearest ones.
    """
    if case not in CASES:
        raise catalog.unknown(case, CASES, "case")
    out = models_directory(models_dir) / "broken" / case
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    arguments = CASES[case].make(out, Family(models_dir)) or {"base_model": out / "model"}
    if not any(out.iterdir()):
        out.rmdir()  # the mistake is in the command, not in a file
    return arguments


def command_of(arguments: Arguments) -> str:
    """Return the command line that looks at a case."""
    words = ["llamalab", "diagnose"]
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--with", "--without"))
        else:
            several = isinstance(value, Sequence) and not isinstance(value, str)
            words += [option, ",".join(map(str, value)) if several else str(value)]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m llamalab_course.broken_models", description=__doc__
    )
    parser.add_argument("case", nargs="?", metavar="CASE", help="none lists them")
    parser.add_argument("--models-dir", default="", metavar="DIR", help="default: models")
    options = parser.parse_args(argv)
    if not options.case:
        for name, case in CASES.items():
            print(f"{name:16} {case.symptom}")
        print("\n'make break CASE=NAME' makes one of them, to be diagnosed.", file=sys.stderr)
        return 0
    try:
        arguments = break_model(options.case, options.models_dir)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(CASES[options.case].symptom, "What is wrong? Guess, then:", sep="\n", file=sys.stderr)
    print(command_of(arguments))
    return 0


if __name__ == "__main__":
    sys.exit(main())
