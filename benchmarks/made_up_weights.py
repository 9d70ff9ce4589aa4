"""Rehearsal: checkpoints and adapters of the true shapes, with made-up values.

What depends on size (time, disk, memory, cuts in the middle) can be tried on these before anybody
has 13.5 GB of licensed weights. The files are in exactly the formats of the real ones; the
numbers in them mean nothing. They are written as everything else is: as views that compute their
rows while they are read, so that no model is ever held in memory.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

from llamalab.catalog import Shape, project_directory, projections
from llamalab.checkpoints import Checkpoint, DirectFile, TensorSpec, raw_bytes, write_torch_archive
from llamalab.surgery import extend, names, read_model

SIZES = {
    "lab": Shape(dim=192, layers=4, heads=6, kv_heads=6, ffn=512),
    "1b": Shape(dim=2048, layers=20, heads=16, kv_heads=16, ffn=5632),
    "7b": Shape(dim=4096, layers=32, heads=32, kv_heads=32, ffn=11008),
    "13b": Shape(dim=5120, layers=40, heads=40, kv_heads=40, ffn=13824),
    "70b": Shape(dim=8192, layers=80, heads=64, kv_heads=8, ffn=28672),
}
"""Shapes by the name that people give them; "1b" is made up, the others are published."""

VOCABULARY, EXTENDED = 32_000, 49_953
"""Pieces of LLaMA's tokenizer, and of the Chinese llama family's."""

_PERIOD = 9_999_991
"""Values after which the made-up numbers come again: a prime, so that no two rows are alike."""


class _MadeUp(Checkpoint):
    """Made-up values in the shapes given: normal, of the size that trained weights have."""

    layout = "meta"

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int):
        self.tensors = {name: TensorSpec(dtype, shape) for name, shape in shapes.items()}
        generator = torch.Generator().manual_seed(seed)
        values = (torch.randn(_PERIOD, generator=generator) * 0.02).to(dtype)
        self._values = torch.cat([values, values])

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        spec = self.tensors[name]
        columns = spec.shape[1] if len(spec.shape) == 2 else 1
        stop = spec.rows if stop is None else stop
        values, at = torch.empty((stop - start) * columns, dtype=spec.dtype), 0
        while at < len(values):
            first = (zlib.crc32(name.encode()) + start * columns + at) % _PERIOD
            count = min(len(values) - at, _PERIOD)
            values[at : at + count] = self._values[first : first + count]
            at += count
        return values.reshape(stop - start, *spec.shape[1:])


class _Shard(Checkpoint):
    """One of the `count` files that Meta cuts a large model into; norms stand in all of them."""

    layout = "meta"

    def __init__(self, whole: Checkpoint, number: int, count: int):
        self._whole, self._number = whole, number
        self.tensors = {}
        for name, spec in whole.tensors.items():
            shape = list(spec.shape)
            if len(shape) == 2:
                shape[self._axis(name)] //= count
            self.tensors[name] = TensorSpec(spec.dtype, tuple(shape))

    @staticmethod
    def _axis(name: str) -> int:
        return int(name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight")))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        shape = self.tensors[name].shape
        stop = shape[0] if stop is None else stop
        if len(shape) == 1:
            return self._whole.read(name, start, stop)
        if self._axis(name) == 0:
            first = self._number * shape[0]
            return self._whole.read(name, first + start, first + stop)
        first = self._number * shape[1]
        return self._whole.read(name, start, stop)[:, first : first + shape[1]]


def write_base(
    directory: Path,
    shape: Shape,
    *,
    size: str = "7B",
    shards: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a base model in Meta layout, and return its size folder, `directory/size`.

    It holds `shards` files of weights and `params.json`. `tokenizer.model`, beside it, is the lab
    family's, filled up to 32,000 pieces with some that no text holds.
    """
    matrices = dict(zip("wq wk wv wo w1 w3 w2".split(), projections(shape).values(), strict=True))
    shapes = {}
    for name in names(shape.layers):
        kind = name.split(".")[-2]
        outside = (VOCABULARY, shape.dim) if "norm" not in kind else (shape.dim,)
        shapes[name] = matrices.get(kind, outside)
    folder = directory / size
    folder.mkdir(parents=True)
    whole = _MadeUp(shapes, dtype, seed=0)
    for number in range(shards):
        _write_archive(folder / f"consolidated.{number:02d}.pth", _Shard(whole, number, shards))
    # Meta's formula for the MLP's width, which the readers of params.json apply, gives `ffn`.
    params = {"dim": shape.dim, "n_layers": shape.layers, "n_heads": shape.heads}
    params |= {"multiple_of": 256, "norm_eps": 1e-6, "vocab_size": -1}
    if shape.kv_heads != shape.heads:
        params |= {"n_kv_heads": shape.kv_heads, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}
    (folder / "params.json").write_text(json.dumps(params))
    lab = project_directory() / "data" / "lab" / "llama-lab" / "tokenizer.model"
    _fill_up(lab, VOCABULARY, directory / "tokenizer.model")
    return folder


def write_adapter(
    folder: Path, shape: Shape, base_tokenizer: Path, *, rank: int = 8, alpha: int = 32
) -> Path:
    """Write an adapter as the Chinese-LLaMA-Alpaca project published them, for every projection.

    That is `adapter_model.bin` in fp16 with the whole embeddings of 49,953 pieces, and the entries
    of a fork of PEFT in `adapter_config.json`. `tokenizer.model` is the base's, the Chinese pieces
    of the lab family after it, filled up in the same way.
    """
    shapes = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in projections(shape).items():
            block = "self_attn" if name in "qkvo" else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{name}_proj"
            shapes[f"{stem}.lora_A.weight"] = (rank, columns)
            shapes[f"{stem}.lora_B.weight"] = (rows, rank)
    shapes["base_model.model.model.embed_tokens.weight"] = (EXTENDED, shape.dim)
    shapes["base_model.model.lm_head.weight"] = (EXTENDED, shape.dim)
    folder.mkdir(parents=True)
    _write_archive(folder / "adapter_model.bin", _MadeUp(shapes, torch.float16, seed=1))
    config = {
        "base_model_name_or_path": "llama-7b-hf",
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.05,
        "merge_weights": False,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "peft_type": "LORA",
        "r": rank,
        "target_modules": [f"{name}_proj" for name in projections(shape)],
        "task_type": "CAUSAL_LM",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    chinese = project_directory() / "data" / "lab" / "chinese-llama-lora-lab" / "tokenizer.model"
    extend(base_tokenizer, chinese, folder / "tokenizer.model")
    _fill_up(folder / "tokenizer.model", EXTENDED, folder / "tokenizer.model")
    return folder


def _write_archive(path: Path, checkpoint: Checkpoint) -> None:
    def content(name: str):
        return map(raw_bytes, checkpoint.blocks(name))

    with DirectFile(path) as file:
        write_torch_archive(file, path.stem, checkpoint.tensors, content)


def _fill_up(tokenizer: Path, pieces: int, out: Path) -> None:
    """Write `tokenizer` with as many pieces as an embedding of `pieces` rows needs."""
    model = read_model(tokenizer)
    for i in range(len(model.pieces), pieces):
        model.pieces.add(piece=f"<made up {i}>", score=-1e6, type=1)
    out.write_bytes(model.SerializeToString())
