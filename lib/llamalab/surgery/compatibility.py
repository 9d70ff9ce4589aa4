"""Do a base model and an adapter belong together? Known before a byte is written."""

import torch

from .. import catalog
from ..checkpoints import Checkpoint
from ..errors import Incompatible
from .adapter import Adapter
from .tokenizer import padded, read_model

LLAMA_2_ROWS = 55_296
"""Rows of the embeddings of every published Chinese adapter for Llama-2."""


def check_targets(base: Checkpoint, adapter: Adapter) -> None:
    targets = adapter.config.get("target_modules")
    some_layers = adapter.config.get("layers_to_transform") is not None
    if isinstance(targets, list) and not some_layers and not adapter.config.get("exclude_modules"):
        for name in base.tensors:
            module = name.removesuffix(".weight")
            adapted = any(module == t or module.endswith(f".{t}") for t in targets)
            if adapted and module not in adapter.pairs and module not in adapter.whole:
                raise Incompatible(
                    f"The adapter {adapter.directory} has no matrices for {module}.",
                    "Its adapter_config.json promises them, or it is for a model with fewer layers.",
                    finding="another-size",
                )
    for module, pair in adapter.pairs.items():
        weight = base.tensors.get(f"{module}.weight")
        if weight is None:
            raise Incompatible(
                f"The adapter {adapter.directory} adapts '{module}', which the base does not have.",
                "It was trained on another model, perhaps one with more layers.",
                finding="another-size",
            )
        a, b = adapter.spec(pair["A"]).shape, adapter.spec(pair["B"]).shape
        if (b[0], a[1]) != weight.shape or a[0] != b[1]:
            raise Incompatible(
                f"The adapter {adapter.directory} does not fit {module}: "
                f"B {b} times A {a} is not {weight.shape}.",
                finding="another-size",
            )


def check_vocabulary(base: Checkpoint, adapter: Adapter) -> None:
    for module, name in adapter.whole.items():
        rows, columns = adapter.spec(name).shape
        old = base.tensors[f"{module}.weight"]
        if columns != old.shape[1]:
            raise Incompatible(
                f"The adapter's {module} is {columns} wide, and the base's {old.shape[1]}.",
                finding="another-size",
            )
        if rows < old.rows:
            raise Incompatible(
                f"The adapter {adapter.directory} has {rows:,} rows in {module}, "
                f"fewer than the base's {old.rows:,}.",
                "A llama adapter on an alpaca model is the classic case: alpaca has one pad token more.",
                finding="mixed-vocabularies",
            )
        if adapter.tokenizer is None:
            raise Incompatible(
                f"The adapter {adapter.directory} has new embeddings and no tokenizer.model.",
                f"Nobody could tell which piece each of its {rows:,} rows stands for.",
                finding="no-tokenizer",
            )
        pieces = len(read_model(adapter.tokenizer).pieces)
        if pieces != rows:
            raise Incompatible(
                f"{adapter.tokenizer} has {pieces:,} pieces, and the adapter's {module} {rows:,} rows.",
                "The tokenizer is of another adapter; llama and alpaca ones differ by one pad token.",
                finding="mixed-vocabularies",
            )

    rows = {adapter.spec(name).rows for name in adapter.whole.values()}
    if adapter.whole and (len(rows) > 1 or (len(adapter.whole) == 1 and rows != {base.vocab_size})):
        raise Incompatible(
            f"The adapter {adapter.directory} would leave an embedding and an output projection "
            "with different numbers of rows.",
            "It holds only one of the two, or two that do not match.",
            finding="adapter-without-embeddings",
        )
    for module in adapter.whole.keys() & adapter.pairs.keys():
        raise Incompatible(
            f"The adapter {adapter.directory} holds {module} both whole and as a LoRA.",
            "Nobody can tell which of them counts.",
            finding="unsupported-adapter",
        )


def contains(base: Checkpoint, adapter: Adapter) -> bool:
    """Whether the base's embedding begins with the adapter's: then the adapter is merged already.

    The merged model may have been cast to another dtype since, which leaves the values of the
    dtype it had, or its rows may have been rounded up for speed.
    """
    name = adapter.whole.get("model.embed_tokens")
    trained = {module.split(".")[-1] for module in adapter.config.get("modules_to_save") or ()}
    if name is None or "embed_tokens" not in trained:  # PEFT can save the base's own along
        return False
    (rows, columns), spec = adapter.spec(name).shape, base.tensors[base.embedding]
    if columns != spec.shape[1] or not (rows == spec.rows or padded(spec.rows, rows)):
        return False
    possible = {spec.dtype, torch.float16, torch.bfloat16}  # in which it may have been merged
    for start, stop in spec.blocks():
        stop = min(stop, rows)
        old, new = base.read(base.embedding, start, stop), adapter.read(name, start, stop)
        possible = {d for d in possible if torch.equal(old, new.to(d).to(spec.dtype))}
        if not possible:
            return False
    return True


def check_not_contained(base: Checkpoint, adapter: Adapter) -> None:
    if contains(base, adapter):
        raise Incompatible(
            f"The base already contains the adapter {adapter.directory}: their embeddings are equal.",
            finding="applied-twice",
        )


def check_published_order(base: Checkpoint, adapter: Adapter) -> None:
    """Refuse two parts of the catalogue that were not trained one on the other.

    A base that is not known can still be told to lack an earlier adapter: by its rows, where
    they are those of the vocabulary that was never extended.
    """
    rows = {adapter.spec(name).rows for name in adapter.whole.values()}
    if base.made_of and rows == {LLAMA_2_ROWS}:
        raise Incompatible(
            f"{adapter.directory} has {LLAMA_2_ROWS:,} rows, as the adapters for Llama-2 have, "
            f"and this base is {' + '.join(base.made_of)}.",
            "The shapes are the same, and the weights are not.",
            finding="another-base",
        )
    if not adapter.name:
        return
    part = catalog.parts()[adapter.name]
    expected = (part.base, part.after) if part.after else (part.base,)
    made_of = base.made_of
    if not made_of and base.vocab_size == catalog.parts()[part.base].vocab:
        made_of = (part.base,)
    if made_of and made_of != expected:
        raise Incompatible(
            f"{adapter.name} was trained on {' + '.join(expected)}, "
            f"and this base is {' + '.join(made_of)}.",
            "Adapters only fit the exact weights they were trained on.",
            f"Give --base-model {part.base}"
            + (f" and --lora-model {part.after},{part.name}." if part.after else "."),
            finding="missing-predecessor" if made_of == expected[:-1] else "another-base",
        )
