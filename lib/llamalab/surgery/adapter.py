"""An adapter as it lies on the disk: which matrices it holds, and at what scale."""

import math
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch

from ..checkpoints import TensorFile, TensorSpec, part_of, read_json
from ..errors import DamagedFile, Incompatible, NotFound, WrongLayout

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
        if self.config.get("bias", "none") != "none":
            refused.append("bias")
        if refused:
            raise Incompatible(
                f"{self.directory} uses {', '.join(refused)}, which this merge does not support.",
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
                        finding="damaged-file",
                    )
            elif match := _WHOLE.fullmatch(plain):
                if not match["original"]:  # PEFT may save the base's own embedding along
                    self._take_whole(match["module"], name)
            else:
                raise Incompatible(
                    f"{self.weights} holds a tensor '{name}' that is no part of a LoRA.",
                    "Leaving it out would give another model than the one that was trained.",
                    finding="unsupported-adapter",
                )
        for module, sides in self.pairs.items():
            if len(sides) == 1:
                other = "B" if "A" in sides else "A"
                raise DamagedFile(
                    f"{self.weights} holds only half of the pair for {module}: lora_{other} is missing.",
                    "A LoRA is the product of the two.",
                    finding="damaged-file",
                )
        self._check_settings()
        promised = {name.split(".")[-1] for name in self.config.get("modules_to_save") or ()}
        for module in sorted(promised - {module.split(".")[-1] for module in self.whole}):
            raise DamagedFile(
                f"{self.weights} does not hold {module}, which adapter_config.json promises.",
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
            alpha = self.config.get("lora_alpha")
            readable &= isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        except (TypeError, ValueError, AttributeError, re.error):
            readable = False
        if not readable:
            raise DamagedFile(
                f"{self.directory / 'adapter_config.json'} cannot be understood.",
                "lora_alpha, alpha_pattern, rank_pattern or modules_to_save is not what PEFT writes.",
                finding="damaged-file",
            )
        for module, rank in ranks.items():
            found = self.spec(self.pairs[module]["A"]).rows
            if rank is not None and rank != found:
                raise DamagedFile(
                    f"{self.directory} says rank {rank} for {module}, and its matrices have {found}.",
                    "adapter_config.json is of another adapter, and so is the alpha in it.",
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
                finding="damaged-file",
            )

    @cached_property
    def name(self) -> str | None:
        """The catalogue's name for this adapter, found by the digest of its weights, or None."""
        return part_of(self.weights)

    def spec(self, name: str) -> TensorSpec:
        return self._file.tensors[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return self._file.read(name, start, stop)

    def scale(self, module: str) -> float:
        """Return alpha / r for `module` (alpha / sqrt(r) for a rank-stabilised LoRA)."""
        rank = self.spec(self.pairs[module]["A"]).rows
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha"))
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank


def adapter_list(lora_model: str | Path | Sequence[str | Path] | None) -> list[str]:
    """Return the adapters named in an option: a list, or one text with commas between them."""
    if lora_model is None:
        return []
    if isinstance(lora_model, (str, Path)):
        lora_model = str(lora_model).split(",")
    return [str(item).strip() for item in lora_model if str(item).strip()]
