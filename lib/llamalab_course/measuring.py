"""What lessons measure and draw with: peak memory, and a font for Chinese."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil


class MemoryWatch:
    """Watches, while its context lasts, how much memory this process holds of its own.

    Attributes:
        grown: bytes, the most that was held beyond what was held at the start.
        exact: whether the system tells pages of files apart, which can be dropped at any time and
            are left out; else they are counted along.
    """

    def __enter__(self) -> MemoryWatch:
        self.grown, self.exact = 0, hasattr(psutil.Process().memory_info(), "shared")
        self._start, self._over = self._own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    @staticmethod
    def _own_memory() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.grown = max(self.grown, self._own_memory() - self._start)


def use_chinese_font() -> str:
    """Make matplotlib draw Chinese on any machine; return the font's name.

    The font, Noto Sans CJK, comes with a package, so that a plot looks the same everywhere.
    """
    import cvttf_NotoSansCJK_Regular
    from matplotlib import font_manager, rcParams

    path = next(Path(cvttf_NotoSansCJK_Regular.__file__).parent.glob("*.otf"))
    font_manager.fontManager.addfont(str(path))
    name = font_manager.FontProperties(fname=str(path)).get_name()
    rcParams["font.family"] = ["DejaVu Sans", name]  # the second draws what the first cannot
    return name
