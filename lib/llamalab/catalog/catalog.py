"""The catalogue: which models there are, of which parts they are made, what is known of each.

The data stand in `catalog.toml` beside this file; models of your own come on top from the file of
the same form that `$LLAMALAB_CATALOG` names. A *part* is a base model or an adapter and has its
own directory under the models directory; a *model* is one base and its adapters in the order they
are merged.
"""

import difflib
import os
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import NotFound, UsageError


@dataclass(frozen=True)
class FileFacts:
    """What is published of one file; None where nothing is. `size` is in bytes."""

    size: int | None = None
    md5: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Shape:
    """The numbers that fix every tensor's shape but the embeddings' rows.

    `ffn` is the width of the MLP; `kv_heads` is less than `heads` under grouped-query attention.
    """

    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True)
class Part:
    """A base model or an adapter.

    Attributes:
        kind: "base" or "adapter".
        files: path inside the part's directory -> what is published of it.
        vocab: rows of the embedding and of the output projection.
        source: default source for a download ("lab" or "hf:OWNER/REPO"), or None.
        folder, context, shape: of a base: the size folder (as "7B"), context length, shape.
        family, base, rank, targets, after: of an adapter: "llama" or "alpaca"; the base it was
            trained on; LoRA rank; adapted projections a layer; the adapter to merge before it.
    """

    name: str
    kind: str
    files: dict[str, FileFacts]
    vocab: int
    source: str | None = None
    folder: str = ""
    context: int = 0
    shape: Shape | None = None
    family: str = ""
    base: str = ""
    rank: int = 0
    targets: int = 7
    after: str | None = None


@dataclass(frozen=True)
class ModelEntry:
    """One base model and 0 or more adapters, in merging order.

    `expects` holds the behavioural claims that the lessons check for this model, by name; a
    claim that is absent is printed by a lesson and not checked.
    """

    name: str
    base: Part
    adapters: tuple[Part, ...] = ()
    expects: dict[str, float] = field(default_factory=dict)

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.base, *self.adapters)

    @property
    def family(self) -> str:
        """ "alpaca" (follows instructions) or "llama" (continues text)."""
        return family_of([part.name for part in self.parts], 0)

    @property
    def template(self) -> str:
        """The name of the prompt template that the family was trained with."""
        return "alpaca" if self.family == "alpaca" else "none"


@cache
def _tables() -> tuple[dict[str, Part], dict[str, ModelEntry]]:
    data = tomllib.loads(Path(__file__).with_name("catalog.toml").read_text(encoding="utf-8"))
    if more := os.environ.get("LLAMALAB_CATALOG"):
        try:
            added = tomllib.loads(Path(more).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"LLAMALAB_CATALOG is {more}, which cannot be read: {error}."
            ) from None
        data = {kind: data[kind] | added.get(kind, {}) for kind in data}
    parts = {}
    for kind in ("base", "adapter"):
        for name, entry in data[kind].items():
            files = {path: FileFacts(**facts) for path, facts in entry.pop("files").items()}
            shape = entry.pop("shape", None)
            shape = Shape(**shape) if shape else None
            parts[name] = Part(name=name, kind=kind, files=files, shape=shape, **entry)
    models = {}
    for name, entry in data["model"].items():
        adapters = tuple(parts[adapter] for adapter in entry["adapters"])
        models[name] = ModelEntry(name, parts[entry["base"]], adapters, entry.get("expects", {}))
    return parts, models


def parts() -> dict[str, Part]:
    """Return every part by name."""
    return dict(_tables()[0])


def models() -> dict[str, ModelEntry]:
    """Return every model by name; bases alone are not among them."""
    return dict(_tables()[1])


def model(name: str) -> ModelEntry:
    """Return the model `name`; the name of a base gives that base with no adapter.

    Raises:
        NotFound: no such name; the message suggests the nearest ones.
    """
    parts, models = _tables()
    if name in models:
        return models[name]
    if name in parts and parts[name].kind == "base":
        return ModelEntry(name, parts[name])
    raise unknown(name, [*models, *(p.name for p in parts.values() if p.kind == "base")])


def parts_of(name: str) -> tuple[Part, ...]:
    """Return the parts that `name`, a model or a part, is made of, the base first.

    Raises:
        NotFound: no such name; the message suggests the nearest ones.
    """
    parts, models = _tables()
    if name in models:
        return models[name].parts
    if name in parts:
        return (parts[name],)
    raise unknown(name, [*models, *parts])


def family_of(made_of: Sequence[str], vocab: int) -> str:
    """Return "llama" or "alpaca" for weights made of these parts, or "" when nobody can tell.

    Args:
        made_of: names of parts, the base first; the last one decides. Empty when not known.
        vocab: rows of the embedding, which tells the families apart where their vocabularies
            differ.
    """
    known = _tables()[0]
    if made_of:
        return known[made_of[-1]].family or "llama"  # a base continues text
    families = {part.family or "llama" for part in known.values() if part.vocab == vocab}
    return families.pop() if len(families) == 1 else ""


def unknown(name: str, known: Iterable[str], what: str = "model") -> NotFound:
    """Return the error for a `name` that is not among `known`, with the nearest spellings."""
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return NotFound(
        f"There is no {what} called '{name}'.",
        f"Did you mean {' or '.join(near)}?" if near else "",
        "'llamalab models' lists every name." if what == "model" else "",
    )
