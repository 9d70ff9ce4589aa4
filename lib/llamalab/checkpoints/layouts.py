"""The two layouts a checkpoint comes in, Meta's and Hugging Face's, and opening either."""

import json
import os
from pathlib import Path

import torch

from ..errors import DamagedFile, NotFound, WrongLayout
from .checkpoint import Checkpoint, TensorSpec
from .digests import diagnose_bytes, is_safe_relative
from .recognition import part_of
from .tensor_file import TensorFile

RECORD = "llamalab.json"
"""The record in every directory we make: inputs and digests, settings, versions, digest."""


def read_json(path: Path) -> dict:
    """Return the JSON object in `path`.

    Raises:
        DamagedFile: it is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        reason = "it is not a JSON object"
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = diagnose_bytes(path) or str(error)
    raise DamagedFile(f"{path} cannot be read: {reason}.", finding="damaged-file")


def _require_numbers(path: Path, config: dict, *keys: str) -> None:
    """Refuse a configuration in which one of `keys` is not a whole number above 0."""
    for key in keys:
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise DamagedFile(
                f"{path} gives {value!r} as '{key}'.",
                "A whole number above 0 belongs there, so this is not the original file.",
                finding="damaged-file",
            )


# Meta splits these over the shards along columns; the norms stand whole in every shard.
_SPLIT_ON_COLUMNS = ("tok_embeddings.weight", "wo.weight", "w2.weight")


class MetaCheckpoint(Checkpoint):
    """Weights as Meta publishes them: `params.json` and `consolidated.NN.pth`, NN from 00.

    Args:
        directory: the folder of one size (as `7B`), or its parent, with `tokenizer.model`
            beside or above the weights.
        model_size: the size folder's name, where the parent holds several.

    Raises:
        WrongLayout, NotFound, DamagedFile: with the file's name and the way out.
    """

    layout = "meta"

    def __init__(self, directory: str | Path, model_size: str | None = None):
        self.directory = folder = find_meta_folder(Path(directory), model_size)
        self.config = read_json(folder / "params.json")
        _require_numbers(folder / "params.json", self.config, "dim", "n_layers", "n_heads")
        paths = sorted(folder.glob("consolidated.*.pth"))
        expected = [folder / f"consolidated.{i:02d}.pth" for i in range(len(paths))]
        if paths != expected:
            gap = next(want for want in expected if want not in paths)
            raise NotFound(f"{gap} is missing.", "The shards are counted from 00 without a gap.")
        self._shards = [TensorFile(path) for path in paths]
        self.tensors = self._join_specs()
        if self.tensors["output.weight"].rows > 100_000:
            raise WrongLayout(
                f"{folder} looks like Llama-3, which this course does not convert.",
                "Its tokenizer is not a SentencePiece model, which the Chinese adapters extend.",
            )
        beside = (folder / "tokenizer.model", folder.parent / "tokenizer.model")
        self.tokenizer = next((path for path in beside if path.is_file()), None)
        if self.tokenizer is None:
            raise NotFound(
                f"tokenizer.model is neither in {folder} nor above it.", finding="no-tokenizer"
            )
        self.inputs = [folder / "params.json", *paths, self.tokenizer]
        base = part_of(folder / "params.json")
        self.made_of = (base,) if base else ()

    def _column_split(self, name: str) -> bool:
        return name.endswith(_SPLIT_ON_COLUMNS)

    def _join_specs(self) -> dict[str, TensorSpec]:
        first, shards = self._shards[0], self._shards
        specs = {}
        every = dict.fromkeys(name for shard in shards for name in shard.tensors)
        for name in every:
            if name.endswith("rope.freqs"):
                continue  # a table that every reader computes itself
            spec = first.tensors.get(name)
            for shard in shards:
                same = spec is not None and shard.tensors.get(name) == spec
                if same and len(spec.shape) == 1:  # norms are replicated
                    same = torch.equal(shard.read(name), first.read(name))
                if not same:
                    raise DamagedFile(
                        f"Tensor {name} differs between {first.path.name} and {shard.path.name}.",
                        finding="damaged-file",
                    )
            shape = list(spec.shape)
            if len(shape) == 2:
                shape[1 if self._column_split(name) else 0] *= len(shards)
            specs[name] = TensorSpec(spec.dtype, tuple(shape))
        for name in ("tok_embeddings.weight", "norm.weight", "output.weight"):
            if name not in specs and "model.embed_tokens.weight" in specs:
                raise WrongLayout(
                    f"{first.path} holds tensors under Hugging Face's names.",
                    "The file was renamed; its rows of q and k are in the other order, too.",
                    finding="hf-weights",
                )
            if name not in specs:
                raise DamagedFile(
                    f"{first.path} holds no tensor '{name}'.",
                    "It is not a LLaMA checkpoint in Meta layout.",
                    finding="damaged-file",
                )
        return specs

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        spec, shards = self.tensors[name], self._shards
        stop = spec.rows if stop is None else stop
        if len(shards) == 1 or len(spec.shape) == 1:
            return shards[0].read(name, start, stop)
        if self._column_split(name):
            return torch.cat([shard.read(name, start, stop) for shard in shards], dim=1)
        each = spec.rows // len(shards)
        pieces = [
            shard.read(name, max(start - i * each, 0), min(stop - i * each, each))
            for i, shard in enumerate(shards)
            if start < (i + 1) * each and stop > i * each
        ]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def find_meta_folder(directory: Path, model_size: str | None = None) -> Path:
    """Return the folder that holds `params.json` and the shards: `directory` or one below it.

    Raises:
        WrongLayout: HF layout, or several sizes and none chosen.
        NotFound: there are no weights in Meta layout.
    """

    def is_meta(folder: Path) -> bool:
        return (folder / "params.json").is_file() and any(folder.glob("consolidated.*.pth"))

    if not directory.is_dir():
        raise NotFound(f"There is no directory '{directory}'.", "", "Check the path.")
    directory = Path(os.path.abspath(directory))  # "." has no parent to look for a tokenizer in
    if is_meta(directory):
        return directory
    sizes = sorted(folder.name for folder in directory.iterdir() if is_meta(folder))
    if model_size and model_size in sizes:
        return directory / model_size
    if not model_size and len(sizes) == 1:
        return directory / sizes[0]
    if sizes:
        raise WrongLayout(
            f"{directory} holds the sizes {', '.join(sizes)}"
            + (f", and not {model_size}." if model_size else "."),
            "One of them must be chosen.",
            f"Add --model-size {sizes[0]}, or give the size folder itself.",
        )
    if (directory / "config.json").is_file():
        raise WrongLayout(
            f"{directory} is in HF layout already: it has a config.json.",
            "Meta layout has params.json and consolidated.00.pth.",
            "Use the directory as it is, for merging or for inference.",
        )
    names = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise NotFound(
        f"{directory} holds no weights in Meta layout.",
        f"params.json and consolidated.00.pth are needed; there is: {names}.",
        "Give the folder of one size (as 7B), or its parent.",
    )


class HFCheckpoint(Checkpoint):
    """A LLaMA in Hugging Face layout: `config.json` and safetensors or `pytorch_model*.bin`.

    Raises:
        WrongLayout, NotFound, DamagedFile: with the file's name and the way out.
    """

    layout = "hf"

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        if not (directory / "config.json").is_file():
            raise WrongLayout(
                f"{directory} does not appear to have a file named config.json.",
                "HF layout needs one; weights in Meta layout have params.json instead.",
                "Convert Meta's files with 'llamalab convert' first.",
            )
        self.config = read_json(directory / "config.json")
        if self.config.get("model_type") != "llama":
            raise WrongLayout(
                f"{directory} holds a model of type '{self.config.get('model_type')}'.",
                "Only LLaMA models are read here.",
            )
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        _require_numbers(directory / "config.json", self.config, *keys, "vocab_size")
        if self.config.get("tie_word_embeddings"):
            raise WrongLayout(
                f"{directory} ties its output projection to its embedding.",
                "LLaMA-1 and Llama-2 do not, and their adapters hold both.",
                "Use the model that the adapter was trained on.",
            )
        files, indexes = _hf_files(directory)
        self._file_of: dict[str, TensorFile] = {}
        for path in files:
            opened = TensorFile(path)
            self._file_of.update(dict.fromkeys(opened.tensors, opened))
        self.tensors = {
            name: self._file_of[name].tensors[name]
            for name in self._file_of
            if not name.endswith("rotary_emb.inv_freq")  # a table old writers saved along
        }
        if self.embedding not in self.tensors:
            if "tok_embeddings.weight" in self.tensors:
                raise _meta_weights(directory, f"{files[0].name} holds tensors under Meta's names.")
            raise DamagedFile(
                f"{directory} holds no tensor '{self.embedding}'.", finding="damaged-file"
            )
        tokenizer = directory / "tokenizer.model"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.inputs = [directory / "config.json", *indexes, *files]
        self.inputs += [tokenizer] if self.tokenizer else []
        made = directory / RECORD
        made_of = read_json(made).get("made_of") if made.is_file() else None
        self.made_of = tuple(made_of) if isinstance(made_of, list) else ()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._file_of[name].read(name, start, stop)


def _hf_files(directory: Path) -> tuple[list[Path], list[Path]]:
    """Return the weight files of an HF directory, and the index that names them if there is one."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if (directory / f"{stem}.{suffix}").is_file():  # first, as transformers looks for it
            return [directory / f"{stem}.{suffix}"], []
        index = directory / f"{stem}.{suffix}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            names = weight_map.values() if isinstance(weight_map, dict) else [None]
            if not all(isinstance(name, str) and is_safe_relative(name) for name in names):
                raise DamagedFile(f"{index} is not an index of shards.", "", "Download it again.")
            names = sorted(set(names))
            missing = [name for name in names if not (directory / name).is_file()]
            if missing:
                raise NotFound(
                    f"{directory / missing[0]} is missing.",
                    f"{index.name} names {len(names)} shards, of which {len(missing)} are not there.",
                    finding="damaged-file",
                )
            return [directory / name for name in names], [index]
    if (directory / "consolidated.00.pth").is_file():
        raise _meta_weights(directory, f"{directory} has a config.json beside Meta's weights.")
    raise NotFound(
        f"{directory} has a config.json and no weights.",
        "model.safetensors or pytorch_model.bin, or an index of shards, is needed.",
        finding="damaged-file",
    )


def _meta_weights(directory: Path, what: str) -> WrongLayout:
    return WrongLayout(what, finding="meta-weights")


def open_checkpoint(directory: str | Path, model_size: str | None = None) -> Checkpoint:
    """Open `directory` in whichever of the two layouts it is."""
    directory = Path(directory)
    if (directory / "config.json").is_file():
        return HFCheckpoint(directory)
    try:
        folder = find_meta_folder(directory, model_size)
    except NotFound as error:
        if not directory.is_dir():
            raise
        if (directory / "adapter_config.json").is_file():
            raise WrongLayout(
                f"{directory} is an adapter, not a model.", finding="adapter-as-model"
            ) from None
        raise WrongLayout(
            f"{directory} does not appear to have a file named config.json, nor params.json.",
            error.why,
            finding="no-config",
        ) from None
    return MetaCheckpoint(folder)
