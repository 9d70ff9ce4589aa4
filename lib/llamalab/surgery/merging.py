"""Merging: an adapter added into a base model's weights.

An adapter holds, for each weight W it adapts, two thin matrices A and B, and it may hold
whole new embeddings. Merged, the model has no more layers than before:

    W' = cast(W.float() + (alpha / r) * (B.float() @ A.float()))

with one rounding to the base's dtype for each adapter, which is what PEFT's default
`merge_and_unload` does; the embeddings are replaced. LoRA: Hu et al., arXiv:2106.09685.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..catalog import locate
from ..checkpoints import Checkpoint, Made, TensorSpec, all_finite, open_checkpoint, write
from ..errors import DamagedFile, UsageError
from .adapter import Adapter, adapter_list
from .compatibility import (
    check_not_contained,
    check_published_order,
    check_targets,
    check_vocabulary,
)
from .conversion import as_hf, as_meta
from .tokenizer import tokenizer_files


class _Merged(Checkpoint):
    """A base with an adapter added, computed while it is read."""

    layout = "hf"

    def __init__(self, base: Checkpoint, adapter: Adapter):
        self._base, self._adapter = base, adapter
        self.tensors = dict(base.tensors)
        for module, name in adapter.whole.items():
            old = base.tensors[f"{module}.weight"]
            self.tensors[f"{module}.weight"] = TensorSpec(old.dtype, adapter.spec(name).shape)
        self.config = base.config | {"vocab_size": self.vocab_size}
        self.tokenizer = adapter.tokenizer or base.tokenizer
        self.inputs = [*base.inputs, *adapter.inputs]
        known = base.made_of and adapter.name
        self.made_of = (*base.made_of, adapter.name) if known else ()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        spec, module = self.tensors[name], name.removesuffix(".weight")
        stop = spec.rows if stop is None else stop
        if module in self._adapter.whole:
            whole = self._adapter.read(self._adapter.whole[module], start, stop)
            return self._finite(name, whole.to(spec.dtype))
        if module not in self._adapter.pairs:
            return self._base.read(name, start, stop)
        # Whole blocks, always cut alike: a matrix product's last bit can depend on its shape.
        cut = [(a, b) for a, b in spec.blocks() if a < stop and b > start]
        merged = [self._merged_block(name, module, a, b) for a, b in cut]
        rows = merged[0] if len(merged) == 1 else torch.cat(merged)
        return rows[start - cut[0][0] : stop - cut[0][0]]

    def _merged_block(self, name: str, module: str, start: int, stop: int) -> torch.Tensor:
        pair = self._adapter.pairs[module]
        a = self._adapter.read(pair["A"]).float()  # [r, in]
        b = self._adapter.read(pair["B"], start, stop).float()  # [rows, r]
        weight = self._base.read(name, start, stop)  # [rows, in]
        # In place, which adds the same numbers: fresh memory would cost more than the sums.
        merged = (b @ a).mul_(self._adapter.scale(module)).add_(weight).to(weight.dtype)
        return self._finite(name, merged)

    def _finite(self, name: str, merged: torch.Tensor) -> torch.Tensor:
        if not all_finite(merged):
            raise DamagedFile(
                f"Merging {name} gives values that are not finite in {merged.dtype}.",
                f"The base or {self._adapter.weights} holds NaN or numbers out of range.",
                finding="unsound-values",
            )
        return merged


def with_lora(base: Checkpoint, adapter: Adapter, *, force: bool = False) -> Checkpoint:
    """Return a view of `base`, in HF layout, with `adapter` merged into it.

    Everything that can be known without arithmetic is checked here, before a byte is written.

    Args:
        force: allow an adapter that the base contains already, to see what happens.

    Raises:
        Incompatible: they do not belong together; the message names the tensor or the step.
    """
    check_targets(base, adapter)
    if not force:
        check_not_contained(base, adapter)
    check_vocabulary(base, adapter)
    if not force:
        check_published_order(base, adapter)
    return _Merged(base, adapter)


def with_adapters(
    base: Checkpoint, adapters: Sequence[Adapter], *, force: bool = False
) -> Checkpoint:
    """Return a view of `base` with every adapter merged into it, in order; see `with_lora`."""
    if not force:
        # A merged model holds the embeddings of its last adapter: said before the first one
        # is found not to fit.
        for adapter in adapters[1:]:
            check_not_contained(base, adapter)
    view = base
    for adapter in adapters:
        view = with_lora(view, adapter, force=force)
    return view


def compose(
    base_model: str | Path,
    lora_model: str | Path | Sequence[str | Path] | None = None,
    *,
    model_size: str | None = None,
    context_length: int | None = None,
    models_dir: str | Path = "",
    force: bool = False,
) -> Checkpoint:
    """Return the view, in HF layout, of a base with adapters in order; no weights are merged yet.

    Args:
        base_model: a directory in either layout, a catalogue name, or `hf:OWNER/REPO`.
        lora_model: none, one or more adapters, likewise.
    """
    view = as_hf(open_checkpoint(locate(base_model, models_dir), model_size), context_length)
    adapters = [Adapter(locate(item, models_dir)) for item in adapter_list(lora_model)]
    return with_adapters(view, adapters, force=force)


def merge(
    base_model: str | Path,
    lora_model: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    model_size: str | None = None,
    output_type: str = "huggingface",
    max_shard_size: str | int = "2GB",
    context_length: int | None = None,
    overwrite: bool = False,
    models_dir: str | Path = "",
) -> Made:
    """Merge one or more adapters, in order, into a base model, and write the result.

    Args:
        base_model: in Meta layout (then it is converted in the same pass) or HF layout.
        lora_model: one adapter, several with commas between them, or a list.
        output_dir: absent or empty; it is complete when this returns, or does not exist.
        output_type: "huggingface", or "pth" for Meta layout.
        max_shard_size, context_length, overwrite: as for `convert`.

    Raises:
        LabError: parts that do not fit, too little disk, an output directory that holds
            something else; nothing is half written.
    """
    if not adapter_list(lora_model):
        raise UsageError("There is no adapter to merge.", "", "Name at least one as --lora-model.")
    options = {"model_size": model_size, "context_length": context_length}
    view = compose(base_model, lora_model, models_dir=models_dir, **options)
    if output_type not in ("huggingface", "pth"):
        raise UsageError(
            f"There is no output type '{output_type}'.", "", "Use 'huggingface' or 'pth'."
        )
    files = tokenizer_files(view)
    if output_type == "pth":
        view, files = as_meta(view), {"tokenizer.model": files["tokenizer.model"]}
    options = {"max_shard_size": max_shard_size, "overwrite": overwrite}
    return write(view, output_dir, files=files, made_by="merge", **options)
