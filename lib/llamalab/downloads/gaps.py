"""Gaps: which bytes of a file are not here yet, and which of these somebody is filling.

Pure arithmetic: nothing here knows of files, threads or servers.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import index


@dataclass(eq=False)
class Gap:
    """Bytes [start, stop) that are not here; `stop` is None while the size is not known."""

    start: int
    stop: int | None
    taken: bool = False


class Gaps(list[Gap]):
    """The gaps of one file, from front to back; each is filled from its front."""

    @classmethod
    def after(cls, missing: list, size: int, length: int) -> Gaps:
        """Return the gaps of a file of `size` bytes, of which `length` lie on the disk.

        `missing` are the pairs (start, stop) that were last written down. Nothing is ever written
        behind a gap that was not, so the file's length says how far the gap has come, since
        then, in which it ends.

        Raises:
            ValueError, TypeError: these are no gaps, or not those of a file of that length.
        """
        gaps, end, here_until = [Gap(0, 0)], 0, 0
        for start, stop in [*missing, (size, size)]:
            if not end <= index(start) <= index(stop) <= size:
                raise ValueError(f"[{start}, {stop}) is no gap behind byte {end}")
            here_until = start if start > end else here_until
            end = stop
            reached = length if start < length <= stop else start
            if reached == gaps[-1].stop:  # pieces of one gap
                gaps[-1].stop = stop
            else:
                gaps.append(Gap(reached, stop))
        if not here_until <= length <= size:
            raise ValueError(f"{length} bytes are not the {here_until} to {size} of these gaps")
        return cls(gap for gap in gaps if gap.start < gap.stop)

    def spans(self) -> list[list[int | None]]:
        """Return [start, stop] of each gap, as `after` takes them."""
        return [[gap.start, gap.stop] for gap in self]

    def take(self) -> Gap | None:
        """Return the first gap that nobody fills, which is taken then; None if there is none."""
        gap = next((gap for gap in self if not gap.taken), None)
        if gap:
            gap.taken = True
        return gap

    def split(self, piece: int) -> None:
        """Cut every gap with an end into pieces of `piece` bytes, so that several may fill it."""
        for number, gap in enumerate(self):  # which comes to what is inserted behind the gap, too
            if gap.stop is not None and gap.stop - gap.start > piece:
                self.insert(number + 1, Gap(gap.start + piece, gap.stop))
                gap.stop = gap.start + piece

    def fill(self, gap: Gap, count: int) -> bool:
        """Take the next `count` bytes of a gap for here; return whether none of it is left."""
        gap.start += count
        if gap.start == gap.stop:
            self.remove(gap)
        return gap.start == gap.stop

    def end_at(self, size: int) -> None:
        """Let the last gap, which had no end, end at `size`."""
        self[-1].stop = size
        self.fill(self[-1], 0)
