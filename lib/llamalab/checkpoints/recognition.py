"""Which model is this? Told from digests and sizes, not from names."""

from __future__ import annotations

from pathlib import Path

from .. import catalog
from ..catalog import Part
from .digests import hash_file


def base_of_params(params: Path) -> tuple[str, ...]:
    """Return the catalogue's name for the base whose params.json this is, as a 0- or 1-tuple."""
    sha256 = hash_file(params)["sha256"]
    for part in catalog.parts().values():
        facts = part.files.get(f"{part.folder}/params.json")
        if facts and facts.sha256 == sha256:
            return (part.name,)
    return ()


def recognise_bases(directory: Path, files: dict[str, int]) -> list[Part]:
    """Return the base models of which `files` (path inside `directory` -> bytes) hold something.

    A model is known by the digest of its params.json or the size of its weights, wherever they
    lie, and not by names, which are easily given to the wrong thing.
    """
    small = [name for name, size in files.items() if name.endswith("params.json") and size < 10_000]
    digests = {hash_file(directory / name)["sha256"] for name in small}
    sizes = {size for name, size in files.items() if name.endswith(".pth")}

    def is_here(part: Part) -> bool:
        return any(
            (name.endswith("params.json") and facts.sha256 in digests)
            or (name.endswith(".pth") and facts.size in sizes)
            for name, facts in part.files.items()
        )

    return [part for part in catalog.parts().values() if part.kind == "base" and is_here(part)]
