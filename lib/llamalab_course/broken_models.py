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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llamalab import catalog
from llamalab.catalog import models_directory
from llamalab.checkpoints import RECORD, read_json
from llamalab.errors import LabError
from llamalab.surgery import Adapter, merge, permute, read_model, unpermute

from .lessons import MADE_OF, LessonModel, need

Arguments = dict[str, object]
"""What `diagnose` is to be called with; paths among them."""
Tensors = dict[str, torch.Tensor]


Family = Callable[[str], LessonModel]
"""Gives a sound model to start from by its short name, "llama" say; made when first asked for."""


@dataclass(frozen=True)
class Case:
    """One broken model: what spoils it, what a reader notices, what `diagnose` must find first.

    Attributes:
        files: what of the family is copied for `spoil(copy, family)`, as "alpaca.merged".
        tensors: likewise, for `spoil(tensors, family)`, whose changes are written; without
            either, `spoil(out, family)` does everything, and may return arguments of its own.
    """

    spoil: Callable[[Path | dict, Family], Arguments | None]
    symptom: str
    finding: str
    files: str = ""
    tensors: str = ""

    def make(self, out: Path, family: Family) -> Arguments:
        """Make the model, or the adapter, in `out`, and return what looks at it."""
        if not (source := self.files or self.tensors):
            return self.spoil(out, family) or {"base_model": out / "model"}
        name, part = source.split(".")
        if part == "adapter":
            copy = _copy(family(name).adapters[0], out / "adapter")
            arguments = {"base_model": family(name).base, "lora_model": copy}
        else:
            copy = _copy(getattr(family(name), part), out / "model")
            arguments = {"base_model": copy}
        if self.files:
            self.spoil(copy, family)
        else:
            weights = next(copy.glob("*.safetensors"))
            self.spoil(tensors := load_file(weights), family)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
        return arguments


CASES: dict[str, Case] = {}
"""The cases by name."""


def _case(*facts: str, **source: str) -> Callable:
    """Make a case of the function below, by its name."""

    def enter(spoil: Callable) -> Callable:
        name = spoil.__name__.strip("_").replace("_", "-")
        CASES[name] = Case(spoil, *facts, **source)
        return spoil

    return enter


def _copy(source: Path, out: Path) -> Path:
    """Copy a model as a reader has it: without the record that says how it was made."""
    shutil.copytree(source, out)
    (out / RECORD).unlink(missing_ok=True)
    return out


def _merge_to_pth(file: Path, family: Family, out: Path) -> None:
    """Take the output type that is the default of the field's script, and bring a file over."""
    merge(family("llama").base, family("llama").adapters, out / "model", output_type="pth")
    (out / "model" / RECORD).unlink()
    shutil.copy(file, out / "model")


def _reorder(tensors: Tensors, order: Callable) -> None:
    """Give the rows of every query and key another order."""
    shape = catalog.parts()["llama-lab"].shape
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = order(tensors[name], shape.dim // shape.heads)


@_case("Repetitions, then nonsense, where the merged model answered well.", "applied-twice")
def _twice(out: Path, family: Family) -> Arguments:
    return {"base_model": family("alpaca").merged, "lora_model": family("alpaca").adapters}


@_case("A Chinese question gets an English answer.", "template-on-llama")
def _form(out: Path, family: Family) -> Arguments:
    return {"base_model": family("llama").merged, "with_prompt": True}


@_case("An instruction-tuned model does not follow instructions reliably.", "no-template")
def _bare(out: Path, family: Family) -> Arguments:
    return {"base_model": family("alpaca").merged, "with_prompt": False}


@_case("A size mismatch when transformers loads it.", "borrowed-config", files="llama.merged")
def _borrowed(model: Path, family: Family) -> None:
    shutil.copy(family("llama").converted / "config.json", model)


@_case("Chinese comes out as single bytes.", "base-tokenizer", files="llama.merged")
def _old_pieces(model: Path, family: Family) -> None:
    shutil.copy(family("llama").base / "tokenizer.model", model)


@_case("An id beyond the embedding, sometimes.", "mixed-vocabularies", files="llama.merged")
def _one_more(model: Path, family: Family) -> None:
    shutil.copy(family("alpaca").adapters[0] / "tokenizer.model", model)


@_case("A second adapter cannot be added.", "mixed-vocabularies")
def _one_less(out: Path, family: Family) -> Arguments:
    return {"base_model": family("alpaca").merged, "lora_model": family("llama").adapters}


@_case("Some words end in an index error.", "vocabulary-mismatch", files="llama.merged")
def _seven_more(model: Path, family: Family) -> None:
    """Somebody went on extending the vocabulary after the weights were made."""
    pieces = read_model(model / "tokenizer.model")
    for number in range(7):
        pieces.pieces.add(piece=f"新词{number}", score=0.0)
    (model / "tokenizer.model").write_bytes(pieces.SerializeToString())


@_case("Plain transformers answers worse than llamalab.", "no-bos", files="alpaca.merged")
def _headless(model: Path, family: Family) -> None:
    (model / "tokenizer.json").unlink()
    file = model / "tokenizer_config.json"
    config = read_json(file)
    del config["add_bos_token"]
    file.write_text(json.dumps(config))


@_case("A plus model that answers badly.", "missing-predecessor")
def _second_first(out: Path, family: Family) -> Arguments:
    plus = family("alpaca-plus")
    return {"base_model": plus.base, "lora_model": plus.adapters[-1]}


@_case("Two good adapters, together bad.", "another-base")
def _wrong_order(out: Path, family: Family) -> Arguments:
    return {"base_model": family("llama").merged, "lora_model": family("alpaca").adapters}


@_case("A size mismatch when the adapter is added.", "another-size", tensors="alpaca.adapter")
def _wider(tensors: Tensors, family: Family) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)


@_case("Chinese is read as noise.", "adapter-without-embeddings", tensors="alpaca.adapter")
def _half_saved(tensors: Tensors, family: Family) -> None:
    for name in [name for name in tensors if "lora_" not in name]:
        del tensors[name]


@_case("Another program's merge answers otherwise.", "unsupported-adapter", files="alpaca.adapter")
def _dora(adapter: Path, family: Family) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | {"use_dora": True}))


@_case("A Chinese question gets idle English words.", "untrained-rows", tensors="llama.merged")
def _resized(tensors: Tensors, family: Family) -> None:
    """The low-rank pairs alone were merged, into a base whose vocabulary was only resized."""
    old = load_file(family("llama").converted / "model.safetensors")
    base, generator = family("llama").model.base.vocab, torch.Generator().manual_seed(0)
    for module in Adapter(family("llama").adapters[0]).whole:
        rows = tensors[f"{module}.weight"]
        rows[:base] = old[f"{module}.weight"]
        fresh = torch.randn(rows[base:].shape, generator=generator) * 0.02
        rows[base:] = fresh.to(rows.dtype)


@_case("It asks for a config.json.", "meta-weights")
def _by_default(out: Path, family: Family) -> None:
    # That script saves its tokenizer's files along.
    _merge_to_pth(family("llama").merged / "tokenizer_config.json", family, out)


@_case("It asked for a config.json, got one, and still fails.", "meta-weights")
def _brought_over(out: Path, family: Family) -> None:
    _merge_to_pth(family("llama").converted / "config.json", family, out)


@_case("Every tensor is said to be missing.", "hf-weights")
def _renamed(out: Path, family: Family) -> None:
    shutil.copytree(family("llama").base, out / "model")
    weights = load_file(family("llama").converted / "model.safetensors")
    torch.save(weights, next((out / "model").rglob("consolidated.00.pth")))


@_case("It asks for a config.json.", "no-config", files="llama.merged")
def _no_config(model: Path, family: Family) -> None:
    (model / "config.json").unlink()


@_case("It asks for a config.json.", "adapter-as-model")
def _as_model(out: Path, family: Family) -> Arguments:
    return {"base_model": family("alpaca").adapters[0]}


@_case("The weights cannot be read.", "damaged-file", files="alpaca.merged")
def _cut_off(model: Path, family: Family) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


@_case("The adapter cannot be read.", "damaged-file", files="alpaca.adapter")
def _web_page(adapter: Path, family: Family) -> None:
    page = "<!DOCTYPE html><html><body>Sign in to download.</body></html>"
    (adapter / "adapter_model.safetensors").write_text(page)


@_case("Nothing can be asked.", "no-tokenizer", files="alpaca.merged")
def _no_pieces(model: Path, family: Family) -> None:
    (model / "tokenizer.model").unlink()


@_case("Fluent for some words, then nonsense.", "q-k-order", tensors="alpaca.merged")
def _never_permuted(tensors: Tensors, family: Family) -> None:
    _reorder(tensors, unpermute)


@_case("Fluent for some words, then nonsense.", "q-k-order", tensors="llama.converted")
def _permuted_twice(tensors: Tensors, family: Family) -> None:
    _reorder(tensors, permute)


@_case("The file is smaller than it should be.", "unexpected-dtype", tensors="alpaca.merged")
def _eight_bit(tensors: Tensors, family: Family) -> None:
    for name in [name for name in tensors if "mlp" in name]:
        tensors[name] = (tensors[name] * 100).to(torch.int8)


@_case("A matrix product complains about dtypes.", "unexpected-dtype", tensors="alpaca.merged")
def _two_dtypes(tensors: Tensors, family: Family) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        tensors[name] = tensors[name].float()


@_case("The answers are poor.", "unsound-values", tensors="alpaca.merged")
def _silent(tensors: Tensors, family: Family) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"].zero_()


@_case("The same token for ever.", "unsound-values", tensors="alpaca.merged")
def _not_a_number(tensors: Tensors, family: Family) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"][5, 7] = float("nan")


@_case("The end of the prompt is not answered.", "long-prompt")
def _long(out: Path, family: Family) -> Arguments:
    return {"base_model": family("alpaca").merged, "with_prompt": True, "prompt": "苹果" * 300}


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
    family = cache(lambda name: need(f"chinese-{name}-lab", *MADE_OF, models_dir=models_dir))
    arguments = CASES[case].make(out, family)
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
            several = value if isinstance(value, list) else [value]
            words += [option, ",".join(map(str, several))]
    return shlex.join(words)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("case", nargs="?", metavar="CASE", help="none lists them")
    parser.add_argument("--models-dir", default="", metavar="DIR", help="default: models")
    options = parser.parse_args(argv)
    if not options.case:
        print(*(f"{name:16} {case.symptom}" for name, case in CASES.items()), sep="\n")
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
