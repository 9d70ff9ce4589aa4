"""Merging: an adapter added into a base model's weights.

An adapter holds, for each weight W it adapts, two thin matrices A and B, and it may hold
whole new embeddings. Merged, the model has no more layers than before:

    W' = cast(W.float() + (alpha / r) * (B.float() @ A.float()))

with one rounding to the base's dtype for each adapter, which is what PEFT's default
`merge_and_unload` does; the embeddings are replaced. LoRA: Hu et al., arXiv:2106.09685.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from . import catalog
from .checkpoint import (
    Checkpoint,
    TensorFile,
    TensorSpec,
    all_finite,
    open_checkpoint,
    read_json,
)
from .conversion import as_hf, as_meta
from .digest import hash_file
from .errors import DamagedFile, Incompatible, NotFound, UsageError, WrongLayout
from .places import locate
from .tokenizer import padded, read_model, tokenizer_files
from .writer import Made, write

LLAMA_2_ROWS = 55_296
"""Rows of the embeddings of every published Chinese adapter for Llama-2."""

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_WHOLE = re.compile(
    r"(?P<module>model\.embed_tokens|lm_head)"
    r"(?P<original>\.original_module)?(\.modules_to_save)?(\.default)?\.weight"
)

# Settings of PEFT that change what the two matrices mean; each is refused by its name.
_UNSUPPORTED = (
    "use_dora", "lora_bias", "layer_replication", "trainable_token_indices", "target_parameters",
    "use_qalora", "alora_invocation_tokens", "use_bdlora", "kasa_config", "monteclora_config",
    "velora_config", "arrow_config", "megatron_config",
)  # fmt: skip


class Adapter:
    """A LoRA adapter in PEFT layout: `adapter_config.json` and `adapter_model.*`.

    Attributes:
        pairs: module name -> {"A": tensor name, "B": tensor name} in the file.
        whole: module name ("model.embed_tokens", "lm_head") -> tensor name in the file.
        tokenizer: the `tokenizer.model` beside it, or None.

    Raises:
        NotFound, WrongLayout, DamagedFile: the directory is no adapter, or is damaged.
        Incompatible: it uses a setting that this merge does not support, named in the message.
    """

    def __init__(self, directory: str | Path):
        self.directory = directory = Path(directory)
        config_file = directory / "adapter_config.json"
        if not config_file.is_file():
            raise WrongLayout(
                f"{directory} is not an adapter: it has no adapter_config.json.",
                "A merged model, for one, needs no adapter any more."
                if (directory / "config.json").is_file()
                else "PEFT's layout has adapter_config.json beside adapter_model.safetensors or .bin.",
                "Give the adapter's directory as --lora-model.",
                finding="damaged-file",
            )
        self.config = read_json(config_file)
        self._refuse_unsupported()
        candidates = [directory / f"adapter_model.{s}" for s in ("safetensors", "bin")]
        self.weights = next((path for path in candidates if path.is_file()), None)
        if self.weights is None:
            raise NotFound(
                f"{directory} has an adapter_config.json and no adapter_model.safetensors or .bin.",
                "The weights did not come along.",
                "Download the adapter again.",
                finding="damaged-file",
            )
        self._file = TensorFile(self.weights)
        self._sort_tensors()
        tokenizer = directory / "tokenizer.model"
        self.tokenizer = tokenizer if tokenizer.is_file() else None
        self.inputs = [config_file, self.weights] + ([tokenizer] if self.tokenizer else [])

    def _refuse_unsupported(self) -> None:
        kind = self.config.get("peft_type", "LORA")
        if kind != "LORA":
            raise Incompatible(
                f"{self.directory} is a {kind} adapter; only LoRA can be merged here.",
                finding="unsupported-adapter",
            )
        refused = [k for k in _UNSUPPORTED if self.config.get(k) not in (None, False, [], "")]
        start = str(self.config.get("init_lora_weights") or "")
        if start.startswith(("pissa", "olora", "corda", "loftq", "lora_ga", "eva")):
            refused.append(f"init_lora_weights '{start}'")  # they change the base's weights, too
        alpha = self.config.get("lora_alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
            raise DamagedFile(
                f"{self.directory / 'adapter_config.json'} gives {alpha!r} as 'lora_alpha'.",
                "A number belongs there: it says how much of the adapter is added.",
                "Download the adapter again.",
                finding="damaged-file",
            )
        if self.config.get("bias", "none") != "none":
            refused.append("bias")
        if refused:
            raise Incompatible(
                f"{self.directory} uses {', '.join(refused)}, which this merge does not support.",
                "Merging it as a plain LoRA would give wrong weights.",
                "Merge it with PEFT's merge_and_unload instead.",
                finding="unsupported-adapter",
            )

    def _sort_tensors(self) -> None:
        self.pairs: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for name in self._file.tensors:
            plain = name.removeprefix("base_model.model.")
            if match := _LORA.fullmatch(plain):
                sides = self.pairs.setdefault(match["module"], {})
                other = sides.setdefault(match["side"], name)
                shape = self.spec(name).shape
                if other != name or len(shape) != 2 or 0 in shape:
                    raise DamagedFile(
                        f"{self.weights} holds '{name}' of shape {shape}"
                        + (f", and '{other}', too." if other != name else "."),
                        "There is one A and one B for each weight, and both are matrices.",
                        "Save the adapter again, or download the original.",
                        finding="damaged-file",
                    )
            elif match := _WHOLE.fullmatch(plain):
                if not match["original"]:  # PEFT may save the base's own embedding along
                    self._take_whole(match["module"], name)
            else:
                raise Incompatible(
                    f"{self.weights} holds a tensor '{name}' that is no part of a LoRA.",
                    "Leaving it out would give another model than the one that was trained.",
                    "Merge this adapter with PEFT's merge_and_unload instead.",
                    finding="unsupported-adapter",
                )
        for module, sides in self.pairs.items():
            if len(sides) == 1:
                other = "B" if "A" in sides else "A"
                raise DamagedFile(
                    f"{self.weights} holds only half of the pair for {module}: lora_{other} is missing.",
                    "A LoRA is the product of the two.",
                    "Download the adapter again, and verify it.",
                    finding="damaged-file",
                )
        self._check_settings()
        promised = {name.split(".")[-1] for name in self.config.get("modules_to_save") or ()}
        for module in sorted(promised - {module.split(".")[-1] for module in self.whole}):
            raise DamagedFile(
                f"{self.weights} does not hold {module}, which adapter_config.json promises.",
                "The adapter was saved without its embeddings, so the new pieces have no meaning.",
                "Save it again with its modules_to_save, or download the original.",
                finding="adapter-without-embeddings",
            )

    def _check_settings(self) -> None:
        """Refuse settings that cannot be read, or that are not of these matrices."""
        try:
            given = self.config.get("r")
            scales = {module: self.scale(module) for module in self.pairs}
            ranks = {m: self._pattern("rank_pattern", m, given) for m in self.pairs}
            readable = all(map(math.isfinite, scales.values()))
            saved = self.config.get("modules_to_save") or []
            readable &= isinstance(saved, list) and all(isinstance(name, str) for name in saved)
        except (TypeError, ValueError, AttributeError, re.error):
            readable = False
        if not readable:
            raise DamagedFile(
                f"{self.directory / 'adapter_config.json'} cannot be understood.",
                "alpha_pattern, rank_pattern or modules_to_save is not what PEFT writes.",
                "Download the adapter again.",
                finding="damaged-file",
            )
        for module, rank in ranks.items():
            found = self.spec(self.pairs[module]["A"]).rows
            if rank is not None and rank != found:
                raise DamagedFile(
                    f"{self.directory} says rank {rank} for {module}, and its matrices have {found}.",
                    "adapter_config.json is of another adapter, and so is the alpha in it.",
                    "Bring both files from one place.",
                    finding="damaged-file",
                )

    def _pattern(self, key: str, module: str, default):
        """Return PEFT's setting for `module`: of the first pattern that its name ends in."""
        for pattern, value in (self.config.get(key) or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        return default

    def _take_whole(self, module: str, name: str) -> None:
        other = self.whole.setdefault(module, name)
        if other != name and not torch.equal(self.read(other), self.read(name)):
            raise Incompatible(
                f"{self.weights} holds two different {module}: '{other}' and '{name}'.",
                "Nobody can tell which of them was trained.",
                "Save the adapter again, or download the original.",
                finding="damaged-file",
            )

    @cached_property
    def name(self) -> str | None:
        """The catalogue's name for this adapter, found by the digest of its weights, or None."""
        sha256 = hash_file(self.weights)["sha256"]
        for part in catalog.parts().values():
            facts = part.files.get(self.weights.name)
            if facts and part.kind == "adapter" and facts.sha256 == sha256:
                return part.name
        return None

    def spec(self, name: str) -> TensorSpec:
        return self._file.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._file.read(name, start, stop)

    def scale(self, module: str) -> float:
        """Return alpha / r for `module` (alpha / sqrt(r) for a rank-stabilised LoRA)."""
        rank = self.spec(self.pairs[module]["A"]).rows
        alpha = self._pattern("alpha_pattern", module, self.config["lora_alpha"])
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


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
                "Verify both; nothing was written.",
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
    _check_targets(base, adapter)
    if not force:
        _check_not_contained(base, adapter)
    _check_vocabulary(base, adapter)
    if not force:
        _check_published_order(base, adapter)
    return _Merged(base, adapter)


def with_adapters(
    base: Checkpoint, adapters: Sequence[Adapter], *, force: bool = False
) -> Checkpoint:
    """Return a view of `base` with every adapter merged into it, in order; see `with_lora`."""
    if not force:
        # A merged model holds the embeddings of its last adapter: said before the first one
        # is found not to fit.
        for adapter in adapters[1:]:
            _check_not_contained(base, adapter)
    view = base
    for adapter in adapters:
        view = with_lora(view, adapter, force=force)
    return view


def _check_targets(base: Checkpoint, adapter: Adapter) -> None:
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
                    "Download the adapter again, and use the base that its card names.",
                    finding="another-size",
                )
    for module, pair in adapter.pairs.items():
        weight = base.tensors.get(f"{module}.weight")
        if weight is None:
            raise Incompatible(
                f"The adapter {adapter.directory} adapts '{module}', which the base does not have.",
                "It was trained on another model, perhaps one with more layers.",
                "Use the base model that the adapter's card names.",
                finding="another-size",
            )
        a, b = adapter.spec(pair["A"]).shape, adapter.spec(pair["B"]).shape
        if (b[0], a[1]) != weight.shape or a[0] != b[1]:
            raise Incompatible(
                f"The adapter {adapter.directory} does not fit {module}: "
                f"B {b} times A {a} is not {weight.shape}.",
                "It was trained on a base of another size.",
                "Use the base model that the adapter's card names.",
                finding="another-size",
            )


def _check_vocabulary(base: Checkpoint, adapter: Adapter) -> None:
    for module, name in adapter.whole.items():
        rows, columns = adapter.spec(name).shape
        old = base.tensors[f"{module}.weight"]
        if columns != old.shape[1]:
            raise Incompatible(
                f"The adapter's {module} is {columns} wide, and the base's {old.shape[1]}.",
                "It was trained on a base of another size.",
                "Use the base model that the adapter's card names.",
                finding="another-size",
            )
        if rows < old.rows:
            raise Incompatible(
                f"The adapter {adapter.directory} has {rows:,} rows in {module}, "
                f"fewer than the base's {old.rows:,}.",
                "A llama adapter on an alpaca model is the classic case: alpaca has one pad token more.",
                "Use the base, or the order of adapters, that this adapter was trained on.",
                finding="mixed-vocabularies",
            )
        if adapter.tokenizer is None:
            raise Incompatible(
                f"The adapter {adapter.directory} has new embeddings and no tokenizer.model.",
                f"Nobody could tell which piece each of its {rows:,} rows stands for.",
                "Put the tokenizer.model of the adapter's repository beside it.",
                finding="no-tokenizer",
            )
        pieces = len(read_model(adapter.tokenizer).pieces)
        if pieces != rows:
            raise Incompatible(
                f"{adapter.tokenizer} has {pieces:,} pieces, and the adapter's {module} {rows:,} rows.",
                "The tokenizer is of another adapter; llama and alpaca ones differ by one pad token.",
                "Bring adapter and tokenizer from one place.",
                finding="mixed-vocabularies",
            )

    rows = {adapter.spec(name).rows for name in adapter.whole.values()}
    if adapter.whole and (len(rows) > 1 or (len(adapter.whole) == 1 and rows != {base.vocab_size})):
        raise Incompatible(
            f"The adapter {adapter.directory} would leave an embedding and an output projection "
            "with different numbers of rows.",
            "It holds only one of the two, or two that do not match.",
            "Save it again with both in modules_to_save.",
            finding="adapter-without-embeddings",
        )
    for module in adapter.whole.keys() & adapter.pairs.keys():
        raise Incompatible(
            f"The adapter {adapter.directory} holds {module} both whole and as a LoRA.",
            "Nobody can tell which of them counts.",
            "Merge it with PEFT's merge_and_unload instead.",
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
        held, new = base.read(base.embedding, start, stop), adapter.read(name, start, stop)
        possible = {d for d in possible if torch.equal(held, new.to(d).to(spec.dtype))}
        if not possible:
            return False
    return True


def _check_not_contained(base: Checkpoint, adapter: Adapter) -> None:
    if contains(base, adapter):
        raise Incompatible(
            f"The base already contains the adapter {adapter.directory}: their embeddings are equal.",
            "Applied again, every change would count twice.",
            "Use the merged model as it is, without --lora-model.",
            finding="applied-twice",
        )


def _check_published_order(base: Checkpoint, adapter: Adapter) -> None:
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
            "Use the base model that the adapter's card names.",
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


def adapter_list(lora_model: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Return the adapters named in an option: a list, or one text with commas between them."""
    if lora_model is None:
        return []
    if isinstance(lora_model, (str, Path)):
        lora_model = str(lora_model).split(",")
    return [str(item).strip() for item in lora_model if str(item).strip()]


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
    view = compose(
        base_model,
        lora_model,
        model_size=model_size,
        context_length=context_length,
        models_dir=models_dir,
    )
    if output_type not in ("huggingface", "pth"):
        raise UsageError(
            f"There is no output type '{output_type}'.", "", "Use 'huggingface' or 'pth'."
        )
    files = tokenizer_files(view)
    if output_type == "pth":
        view, files = as_meta(view), {"tokenizer.model": files["tokenizer.model"]}
    return write(
        view,
        output_dir,
        files=files,
        made_by="merge",
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
