"""Gaps: which bytes of a file are not here yet, and which of these somebody is filling.

Pure arithmetic: nothing here knows of files, threads or servers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index


@dataclass(eq=False)
class Gap:
    """Bytes [start, stop) that are not here; `stop` is None while the size is not known."""

    start: int
    stop: int | None
    taken: bool = False


class Gaps:
    """The gaps of one file, from front to back; each is filled from its front."""

    def __init__(self, gaps: Iterable[Gap] = ()):
        self._gaps = list(gaps)

    @classmethod
    def after(cls, missing: Iterable, size: int, length: int) -> Gaps:
        """Return the gaps of a file of `size` bytes, of which `length` lie on the disk.

        `missing` are the pairs (start, stop) that were last written down. Nothing is ever written
        behind a gap that was not, so the file's length says how far the gap has come, since
        then, in which it ends.

        Raises:
            ValueError, TypeError: these are no gaps, or not those of a file of that length.
        """
        gaps, end, here_until = cls(), 0, 0
        for start, stop in [*missing, (size, size)]:
            if not end <= index(start) <= index(stop) <= size:
                raise ValueError(f"[{start}, {stop}) is no gap behind byte {end}")
            here_until = start if start > end else here_until
            end = stop
            reached = length if start < length <= stop else start
            gaps._gaps += [Gap(reached, stop)] if reached < stop else []
        if not here_until <= length <= size:
            raise ValueError(f"{length} bytes are not the {here_until} to {size} of these gaps")
        return gaps

    def __iter__(self) -> Iterator[Gap]:
        return iter(self._gaps)

    def __len__(self) -> int:
        return len(self._gaps)

    def spans(self) -> list[list[int | None]]:
        """Return [start, stop] of each gap, as `after` takes them."""
        return [[gap.start, gap.stop] for gap in self._gaps]

    def take(self) -> Gap | None:
        """Return the first gap that nobody fills, which is taken then; None if there is none."""
        gap = next((gap for gap in self._gaps if not gap.taken), None)
        if gap:
            gap.taken = True
        return gap

    def cut(self, gap: Gap, piece: int) -> bool:
        """Leave to others what lies behind the next `piece` bytes; return whether anything does."""
        if gap.stop is None or gap.stop - gap.start <= piece:
            return False
        rest = Gap(gap.start + piece, gap.stop)
        self._gaps.insert(self._gaps.index(gap) + 1, rest)
        gap.stop = rest.start
        return True

    def fill(self, gap: Gap, count: int) -> bool:
        """Take the next `count` bytes of a gap for here; return whether none of it is left."""
        gap.start += count
        if gap.start == gap.stop:
            self._gaps.remove(gap)
        return gap.start == gap.stop

    def end_at(self, size: int) -> None:
        """Let the last gap, which had no end, end at `size`."""
        last = self._gaps[-1]
        last.stop = size
        self.fill(last, 0)
