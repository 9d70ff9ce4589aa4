"""What a model costs before a byte of it is fetched: arithmetic on the shapes in the catalogue.

All sizes are in bytes, all counts exact unless the text says "about". A value takes 2 bytes
in fp16 and bf16, 4 in fp32. Containers (zip, JSON headers, tokenizer files) come on top: a few
hundred KB that no decision hangs on.
"""

from dataclasses import asdict, dataclass

from ..units import size_text
from .catalog import ModelEntry, Part, Shape

# Anonymous memory of a convert or merge: PyTorch itself takes 0.15 GB (measured), the rest is
# room for a few blocks of rows. Tensors pass through in such blocks, so no model needs more.
STREAMED = 300_000_000

# What Python, PyTorch and transformers occupy before the first weight is read; measured.
RUNTIME = 400_000_000

# Parameters of a model that a CPU holds in fp32, for exactness; a larger one keeps its dtype, as
# the time for a token is the time to read all weights once, and fp32 doubles both.
FP32_BELOW = 1_000_000_000


def projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return one layer's seven weight matrices as name -> (rows, columns)."""
    kv = shape.dim // shape.heads * shape.kv_heads
    return {
        "q": (shape.dim, shape.dim),
        "k": (kv, shape.dim),
        "v": (kv, shape.dim),
        "o": (shape.dim, shape.dim),
        "gate": (shape.ffn, shape.dim),
        "up": (shape.ffn, shape.dim),
        "down": (shape.dim, shape.ffn),
    }


def layer_parameters(shape: Shape) -> int:
    """Return the numbers in one layer: seven matrices and two norms of `dim`."""
    return sum(rows * columns for rows, columns in projections(shape).values()) + 2 * shape.dim


def parameters(shape: Shape, vocab: int) -> int:
    """Return how many numbers a LLaMA holds.

    That is an embedding and an output projection of (vocab, dim), the layers, and the last norm.
    """
    return 2 * vocab * shape.dim + shape.layers * layer_parameters(shape) + shape.dim


def checkpoint_bytes(shape: Shape, vocab: int, bytes_per_value: int = 2) -> int:
    """Return the bytes of all weights, without the container around them."""
    return parameters(shape, vocab) * bytes_per_value


def lora_parameters(part: Part, shape: Shape) -> int:
    """Return the numbers in the low-rank pairs alone: rank x (rows + columns) for each matrix.

    Adapters with four targets adapt q, k, v and o; those with seven, every projection.
    """
    adapted = list(projections(shape).values())[: part.targets]
    return shape.layers * part.rank * sum(rows + columns for rows, columns in adapted)


def adapter_bytes(part: Part, shape: Shape, bytes_per_value: int = 2) -> int:
    """Return the bytes of an adapter: its low-rank pairs and its two whole embeddings.

    Published ones are in fp16; a few of the largest were saved in fp32, at twice the size.
    """
    return (lora_parameters(part, shape) + 2 * part.vocab * shape.dim) * bytes_per_value


def kv_cache_bytes(shape: Shape, tokens: int, batch: int = 1, bytes_per_value: int = 2) -> int:
    """Return what attention remembers of `tokens` tokens: a key and a value a layer and kv head."""
    head_dim = shape.dim // shape.heads
    return 2 * shape.layers * shape.kv_heads * head_dim * tokens * batch * bytes_per_value


def workspace_bytes(shape: Shape, vocab: int, tokens: int, bytes_per_value: int = 2) -> int:
    """Return, about, what one forward pass holds besides weights and cache.

    That is one layer's activations for all `tokens` at once (four vectors of `dim`, two of
    `ffn`) and one row of fp32 logits; attention that stores its scores takes more.
    """
    return tokens * (4 * shape.dim + 2 * shape.ffn) * bytes_per_value + vocab * 4


def inference_bytes(shape: Shape, vocab: int, tokens: int, bytes_per_value: int = 2) -> int:
    """Return, about, what answering takes: weights, cache of `tokens`, workspace and runtime."""
    return (
        checkpoint_bytes(shape, vocab, bytes_per_value)
        + kv_cache_bytes(shape, tokens, 1, bytes_per_value)
        + workspace_bytes(shape, vocab, tokens, bytes_per_value)
        + RUNTIME
    )


@dataclass(frozen=True)
class Needs:
    """What the course asks of a machine for one model, in bytes; `str()` shows the arithmetic.

    Attributes:
        parameters: numbers in the final model.
        download: the base and its adapters.
        converted, merged: the directories made; merged is 0 for a base without adapters.
        disk: all of these at once, the most that is ever there.
        streaming_memory: to convert or merge, one tensor at a time.
        inference_memory: to answer: weights, KV cache at full context, workspace, runtime.
        cpu_memory: the same on a CPU, which holds models below `FP32_BELOW` in fp32.
        arithmetic: one line of text a step.
    """

    model: str
    parameters: int
    download: int
    converted: int
    merged: int
    disk: int
    streaming_memory: int
    inference_memory: int
    cpu_memory: int
    arithmetic: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((f"{self.model} needs, by arithmetic:", *self.arithmetic))

    def as_dict(self) -> dict:
        return asdict(self)


def needs(model: ModelEntry) -> Needs:
    """Return what `model` will need, from its catalogue entry alone."""
    base, shape, vocab = model.base, model.base.shape, model.parts[-1].vocab
    total = parameters(shape, vocab)
    original = checkpoint_bytes(shape, base.vocab)
    download = original + sum(adapter_bytes(part, shape) for part in model.adapters)
    merged = checkpoint_bytes(shape, vocab) if model.adapters else 0
    memory = inference_bytes(shape, vocab, base.context)
    in_fp32 = total < FP32_BELOW
    on_cpu = inference_bytes(shape, vocab, base.context, 4) if in_fp32 else memory
    return Needs(
        model=model.name,
        parameters=total,
        download=download,
        converted=original,
        merged=merged,
        disk=download + original + merged,
        streaming_memory=STREAMED,
        inference_memory=memory,
        cpu_memory=on_cpu,
        arithmetic=(*_on_disk(model, total, original, download, merged), *_in_memory(model)),
    )


def _on_disk(model: ModelEntry, total: int, original: int, download: int, merged: int):
    """Yield the arithmetic of parameters and files, a line of text a step."""
    base, shape, vocab = model.base, model.base.shape, model.parts[-1].vocab
    layer = layer_parameters(shape)
    yield f"embeddings  2 x {vocab:,} tokens x {shape.dim:,} = {2 * vocab * shape.dim:,}"
    yield f"layers      {shape.layers} layers x {layer:,} = {shape.layers * layer:,}"
    yield f"parameters  embeddings + layers + one norm of {shape.dim:,} = {total:,}"
    yield f"base        {parameters(shape, base.vocab):,} x 2 bytes = {size_text(original)}"
    for part in model.adapters:
        pairs, whole = lora_parameters(part, shape), 2 * part.vocab * shape.dim
        numbers = f"({pairs:,} in low-rank pairs + {whole:,} in embeddings)"
        yield f"adapter     {numbers} x 2 bytes = {size_text(adapter_bytes(part, shape))}"
    fetched = "base + adapters" if model.adapters else "the base"
    yield f"download    {fetched} = {size_text(download)}"
    yield f"converted   the base again, in HF layout = {size_text(original)}"
    if merged:
        yield f"merged      {total:,} x 2 bytes = {size_text(merged)}"
    parts = "download + converted + merged" if merged else "download + converted"
    yield f"disk        {parts} = {size_text(download + original + merged)}"


def _in_memory(model: ModelEntry):
    """Yield the arithmetic of memory, a line of text a step."""
    shape, vocab, tokens = model.base.shape, model.parts[-1].vocab, model.base.context
    parts = {
        "weights": checkpoint_bytes(shape, vocab),
        "KV cache": kv_cache_bytes(shape, tokens),
        "workspace": workspace_bytes(shape, vocab, tokens),
        "runtime": RUNTIME,
    }
    heads = f"{shape.kv_heads} heads x {shape.dim // shape.heads}"
    cache = f"2 x {shape.layers} layers x {heads} x {tokens:,} tokens x 2 bytes"
    yield f"to convert  about {size_text(STREAMED)} of memory, and to merge: row block by row block"
    yield f"KV cache    {cache} = {size_text(parts['KV cache'])}"
    total = " + ".join(f"{name} {size_text(size)}" for name, size in parts.items())
    yield f"to answer   {total} = {size_text(sum(parts.values()))}"
    if parameters(shape, vocab) < FP32_BELOW:
        on_cpu = size_text(inference_bytes(shape, vocab, tokens, 4))
        yield f"on a CPU    the same with 4 bytes a value, fp32 = {on_cpu}"


AFFORDABLE = 500_000_000
"""Bytes that a notebook makes unasked; for more, it names the notebook and the command."""
