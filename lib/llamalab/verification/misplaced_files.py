"""Layout: do the files lie where the course looks for them, and if not, how do they get there?

Two wrong arrangements are common: *flat*, all files in one directory, and *nested*, the right tree
inside one directory more, as in `LLaMA/7B`. Both are found in the same way: a file that is missing
at its place lies elsewhere under the directory, by the same name.
"""

from dataclasses import dataclass
from pathlib import Path

from ..catalog import FileFacts
from ..errors import OutputExists
from ..progress import say


@dataclass(frozen=True)
class Move:
    """A file that lies at `found` and belongs at `place`; both are relative to the directory."""

    found: str
    place: str

    def __str__(self) -> str:
        return f"{self.found} -> {self.place}"


def arrange(directory: Path, known: dict[str, FileFacts], files: dict[str, int]) -> list[Move]:
    """Return the moves that bring misplaced files to their places.

    Args:
        known: path inside the directory -> what is published, for every file that should be there.
        files: path inside the directory -> bytes, for every file that is there.

    Left where they are: a file of another size than the published one, a link, one that two
    places could claim, one that has a rival of the same name.
    """
    spare = [n for n in files if n not in known and not (directory / n).is_symlink()]

    def candidates(place: str) -> list[str]:
        tail = place.rpartition("/")[2]
        nested = [name for name in spare if f"/{name}".endswith(f"/{place}")]
        named = nested or [name for name in spare if name.rpartition("/")[2] == tail]
        return [name for name in named if known[place].size in (None, files[name])]

    found = {place: candidates(place) for place in known if place not in files}
    claims = [name for names in found.values() for name in names]
    alone = {place: names[0] for place, names in sorted(found.items()) if len(names) == 1}
    return [Move(name, place) for place, name in alone.items() if claims.count(name) == 1]


def apply(directory: Path, moves: list[Move]) -> None:
    """Make `moves`, each said before it is made; directories that this empties go as well.

    Raises:
        OutputExists: something lies at a place already; nothing is ever overwritten.
    """
    for move in moves:
        found, place = directory / move.found, directory / move.place
        if place.exists() or place.is_symlink():
            raise OutputExists(f"'{place}' is there already, so '{found}' was not moved.")
        say(f"moving {move} in '{directory}'")
        place.parent.mkdir(parents=True, exist_ok=True)
        found.rename(place)
        for parent in found.parents:
            if parent == directory or any(parent.iterdir()):
                break
            say(f"removing '{parent}', which is empty now")
            parent.rmdir()
