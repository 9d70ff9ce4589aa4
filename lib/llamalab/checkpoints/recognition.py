"""Which model is this? Told from digests and sizes, not from names."""

from pathlib import Path

from .. import catalog
from ..catalog import Part
from .digests import hash_file


def part_of(file: Path) -> str | None:
    """Return the catalogue's name of the part that a file belongs to, found by its digest.

    Of a base that is its params.json, of an adapter its weights; None for what is not known.
    """
    sha256 = hash_file(file)["sha256"]
    for part in catalog.parts().values():
        for path, facts in part.files.items():
            if facts.sha256 == sha256 and path.rpartition("/")[2] == file.name:
                return part.name
    return None


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
