"""A checkpoint is something that can be read one tensor at a time.

`MetaCheckpoint` and `HFCheckpoint` read the two layouts from disk; the views in `conversion`
and `merging` stand on top of them and look the same from outside. A checkpoint answers
names, shapes, dtypes and sizes without reading any weights, so that a whole plan can be
checked before the first byte is written.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

BLOCK_BYTES = 4 * 2**20
"""Tensors are read, computed and written in blocks of whole rows of about this size.

Small enough that a block and its fp32 sums stay near the processor, and that their memory is used
again and not asked of the system anew: with 16 MiB merging took three times as long (measured).
"""

SAFETENSORS_NAMES = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
"""The dtypes that weights come in, with their names in the safetensors format."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without reading it."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        return self.shape[0]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) row ranges that cover the tensor in order.

        They depend on the spec alone: the same tensor is always cut in the same places, so
        that bytes computed block by block do not depend on who asks for them.
        """
        step = max(1, BLOCK_BYTES // max(1, self.nbytes // max(1, self.rows)))
        if step > 256:
            step -= step % 256
        for start in range(0, self.rows, step):
            yield start, min(start + step, self.rows)


class Checkpoint:
    """Base of everything that can be read one tensor at a time.

    Attributes:
        layout: "meta" or "hf".
        config: the content of `params.json` (Meta layout) or `config.json` (HF layout).
        tensors: name -> `TensorSpec`, in the order in which they are written.
        tokenizer: the `tokenizer.model` that belongs to the weights, or None.
        inputs: the files that the tensors, configuration and tokenizer come from.
        made_of: names of the catalogue's parts that the weights are made of, the base first;
            empty when they are not known to the catalogue.
    """

    layout: str
    config: dict
    tensors: dict[str, TensorSpec]
    tokenizer: Path | None
    inputs: list[Path]
    made_of: tuple[str, ...]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of the tensor `name`, on the CPU, in its spec's dtype."""
        raise NotImplementedError

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the tensor `name` as blocks of whole rows, in order."""
        for start, stop in self.tensors[name].blocks():
            yield self.read(name, start, stop)

    @property
    def embedding(self) -> str:
        """The name of the token embedding in this layout."""
        return "tok_embeddings.weight" if self.layout == "meta" else "model.embed_tokens.weight"

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding."""
        return self.tensors[self.embedding].rows

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the token embedding, which stands for the checkpoint's."""
        return self.tensors[self.embedding].dtype

    @property
    def total_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors.values())


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of `tensor`, little-endian and in row order, without a copy if it can be."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def all_finite(weights: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; one sum tells, unless it overflows."""
    total = weights.sum(dtype=torch.float32)
    return bool(torch.isfinite(total) or torch.isfinite(weights).all())


def tensor_digest(digests: dict[str, tuple[TensorSpec, str]]) -> str:
    """Return one sha256 for a whole checkpoint, whatever the container it lies in.

    Args:
        digests: name -> (spec, sha256 of the tensor's bytes).

    It is the sha256 over the lines `name dtype shape sha256`, sorted by name: two files of the
    same tensors agree even when their containers differ, which file hashes do not.
    """
    total = hashlib.sha256()
    for name, (spec, sha256) in sorted(digests.items()):
        shape = "x".join(map(str, spec.shape))
        total.update(f"{name} {SAFETENSORS_NAMES[spec.dtype]} {shape} {sha256}\n".encode())
    return total.hexdigest()


def digest_tensors(checkpoint: Checkpoint, on_bytes=None) -> dict[str, str]:
    """Read every tensor of `checkpoint` and return name -> sha256 of its bytes."""
    result = {}
    for name in checkpoint.tensors:
        sha256 = hashlib.sha256()
        for block in checkpoint.blocks(name):
            sha256.update(raw_bytes(block))
            if on_bytes:
                on_bytes(block.nbytes)
        result[name] = sha256.hexdigest()
    return result
