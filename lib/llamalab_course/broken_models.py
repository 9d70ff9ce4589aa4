"""The clinic: models broken on purpose, one mistake each, for a reader to diagnose.

    python -m llamalab_course.broken_models          the cases, and what a reader of each would see
    python -m llamalab_course.broken_models CASE     makes models/broken/CASE, and says how to look at it

A case is a line of `CASES`: a function of a few lines that spoils a copy of the lab family, what
one would notice, and the finding that `diagnose` must put first.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from llamalab import catalog
from llamalab.catalog import models_directory
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


def _copy(source: Path, out: Path) -> Path:
    """Copy a model as a reader has it: without the record that says how it was made."""
    shutil.copytree(source, out)
    (out / "llamalab.json").unlink(missing_ok=True)
    return out


def _edited(source: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Copy a model or an adapter, and let `change` alter its tensors."""
    weights = next(_copy(source, out).glob("*.safetensors"))
    tensors = load_file(weights)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)


def _with_file(file: Path, family: Family, out: Path) -> None:
    """Copy the llama model, and bring a file over into it."""
    shutil.copy(file, _copy(family.llama.merged, out / "model"))


def _without_file(name: str, source: Path, out: Path) -> None:
    (_copy(source, out / "model") / name).unlink()


def _edited_adapter(family: Family, out: Path, change) -> Arguments:
    _edited(family.alpaca.adapters[0], out / "adapter", change)
    return {"base_model": family.alpaca.base, "lora_model": out / "adapter"}


def _stray_tokenizer(out: Path, family: Family) -> None:
    """A vocabulary that somebody went on extending after the weights were made."""
    model = _copy(family.llama.merged, out / "model")
    pieces = read_model(model / "tokenizer.model")
    for number in range(7):
        pieces.pieces.add(piece=f"新词{number}", score=0.0)
    (model / "tokenizer.model").write_bytes(pieces.SerializeToString())


def _no_bos(out: Path, family: Family) -> None:
    model = _copy(family.alpaca.merged, out / "model")
    (model / "tokenizer.json").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text("utf-8"))
    del config["add_bos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(config))


def _without_embeddings(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_" not in name]:
        del tensors[name]


def _wider_base(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "lora_A" in name]:
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)


def _untrained_rows(out: Path, family: Family) -> None:
    """Merge the low-rank pairs alone, into a base whose vocabulary was only resized."""
    adapter, base = Adapter(family.llama.adapters[0]), family.llama.model.base.vocab

    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        old = load_file(family.llama.converted / "model.safetensors")
        for module in adapter.whole:
            rows = tensors[f"{module}.weight"]
            rows[:base] = old[f"{module}.weight"]
            fresh = torch.randn(rows[base:].shape, generator=generator) * 0.02
            rows[base:] = fresh.to(rows.dtype)

    _edited(family.llama.merged, out / "model", change)


def _merged_to_pth(file: Path, family: Family, out: Path) -> None:
    """Take the output type that is the default of the field's script, and bring a file over."""
    merge(family.llama.base, family.llama.adapters, out / "model", output_type="pth")
    (out / "model" / "llamalab.json").unlink()
    shutil.copy(file, out / "model")


def _renamed_weights(out: Path, family: Family) -> None:
    shutil.copytree(family.llama.base, out / "model")
    weights = load_file(family.llama.converted / "model.safetensors")
    torch.save(weights, next((out / "model").rglob("consolidated.00.pth")))


def _cut_off(out: Path, family: Family) -> None:
    weights = _copy(family.alpaca.merged, out / "model") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def _html_page(out: Path, family: Family) -> Arguments:
    weights = _copy(family.alpaca.adapters[0], out / "adapter") / "adapter_model.safetensors"
    weights.write_text("<!DOCTYPE html><html><body>Sign in to download.</body></html>")
    return {"base_model": family.alpaca.base, "lora_model": weights.parent}


def _dora(out: Path, family: Family) -> Arguments:
    adapter = _copy(family.alpaca.adapters[0], out / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    return {"base_model": family.alpaca.base, "lora_model": adapter}


def _reorder(order: Callable) -> Callable[[dict[str, torch.Tensor]], None]:
    shape = catalog.parts()["llama-lab"].shape

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensors[name] = order(tensors[name], shape.dim // shape.heads)

    return change


def _quantise(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "mlp" in name]:
        tensors[name] = (tensors[name] * 100).to(torch.int8)


def _mix_dtypes(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        tensors[name] = tensors[name].float()


def _zero(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.down_proj.weight"].zero_()


def _not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.v_proj.weight"][5, 7] = float("nan")


CASES = {
    "twice": Case(
        lambda out, f: {"base_model": f.alpaca.merged, "lora_model": f.alpaca.adapters},
        "Repetitions, then nonsense, where the merged model answered well.",
        "applied-twice",
    ),
    "form": Case(
        lambda out, f: {"base_model": f.llama.merged, "with_prompt": True},
        "A Chinese question gets an English answer.",
        "template-on-llama",
    ),
    "bare": Case(
        lambda out, f: {"base_model": f.alpaca.merged, "with_prompt": False},
        "An instruction-tuned model does not follow instructions reliably.",
        "no-template",
    ),
    "borrowed": Case(
        lambda out, f: _with_file(f.llama.converted / "config.json", f, out),
        "A size mismatch when transformers loads it.",
        "borrowed-config",
    ),
    "old-pieces": Case(
        lambda out, f: _with_file(f.llama.base / "tokenizer.model", f, out),
        "Chinese comes out as single bytes.",
        "base-tokenizer",
    ),
    "one-more": Case(
        lambda out, f: _with_file(f.alpaca.adapters[0] / "tokenizer.model", f, out),
        "An id beyond the embedding, sometimes.",
        "mixed-vocabularies",
    ),
    "one-less": Case(
        lambda out, f: {"base_model": f.alpaca.merged, "lora_model": f.llama.adapters},
        "A second adapter cannot be added.",
        "mixed-vocabularies",
    ),
    "seven-more": Case(
        _stray_tokenizer, "Some words end in an index error.", "vocabulary-mismatch"
    ),
    "headless": Case(_no_bos, "Plain transformers answers worse than llamalab.", "no-bos"),
    "second-first": Case(
        lambda out, f: {"base_model": f.plus.base, "lora_model": f.plus.adapters[-1]},
        "A plus model that answers badly.",
        "missing-predecessor",
    ),
    "wrong-order": Case(
        lambda out, f: {"base_model": f.llama.merged, "lora_model": f.alpaca.adapters},
        "Two good adapters, together bad.",
        "another-base",
    ),
    "wider": Case(
        lambda out, f: _edited_adapter(f, out, _wider_base),
        "A size mismatch when the adapter is added.",
        "another-size",
    ),
    "half-saved": Case(
        lambda out, f: _edited_adapter(f, out, _without_embeddings),
        "Chinese is read as noise.",
        "adapter-without-embeddings",
    ),
    "dora": Case(
        _dora, "Another program's merge of it gives other answers.", "unsupported-adapter"
    ),
    "resized": Case(
        _untrained_rows, "Chinese questions get English words that say little.", "untrained-rows"
    ),
    "by-default": Case(  # that script saves its tokenizer's files along
        lambda out, f: _merged_to_pth(f.llama.merged / "tokenizer_config.json", f, out),
        "It asks for a config.json.",
        "meta-weights",
    ),
    "brought-over": Case(
        lambda out, f: _merged_to_pth(f.llama.converted / "config.json", f, out),
        "It asked for a config.json, got one, and still fails.",
        "meta-weights",
    ),
    "renamed": Case(_renamed_weights, "Every tensor is said to be missing.", "hf-weights"),
    "no-config": Case(
        lambda out, f: _without_file("config.json", f.llama.merged, out),
        "It asks for a config.json.",
        "no-config",
    ),
    "as-model": Case(
        lambda out, f: {"base_model": f.alpaca.adapters[0]},
        "It asks for a config.json.",
        "adapter-as-model",
    ),
    "cut-off": Case(_cut_off, "The weights cannot be read.", "damaged-file"),
    "web-page": Case(_html_page, "The adapter cannot be read.", "damaged-file"),
    "no-pieces": Case(
        lambda out, f: _without_file("tokenizer.model", f.alpaca.merged, out),
        "Nothing can be asked.",
        "no-tokenizer",
    ),
    "never-permuted": Case(
        lambda out, f: _edited(f.alpaca.merged, out / "model", _reorder(unpermute)),
        "Fluent for some words, then nonsense.",
        "q-k-order",
    ),
    "permuted-twice": Case(
        lambda out, f: _edited(f.llama.converted, out / "model", _reorder(permute)),
        "Fluent for some words, then nonsense.",
        "q-k-order",
    ),
    "eight-bit": Case(
        lambda out, f: _edited(f.alpaca.merged, out / "model", _quantise),
        "The file is smaller than it should be.",
        "unexpected-dtype",
    ),
    "two-dtypes": Case(
        lambda out, f: _edited(f.alpaca.merged, out / "model", _mix_dtypes),
        "A matrix product complains about dtypes.",
        "unexpected-dtype",
    ),
    "silent": Case(
        lambda out, f: _edited(f.alpaca.merged, out / "model", _zero),
        "The answers are poor.",
        "unsound-values",
    ),
    "not-a-number": Case(
        lambda out, f: _edited(f.alpaca.merged, out / "model", _not_a_number),
        "The same token for ever.",
        "unsound-values",
    ),
    "long": Case(
        lambda out, f: {"base_model": f.alpaca.merged, "with_prompt": True, "prompt": "苹果" * 300},
        "The end of the prompt is not answered.",
        "long-prompt",
    ),
}
"""The cases by name."""


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
