"""One progress bar for long work: a widget in a notebook, a line on a terminal, else silent."""

from __future__ import annotations

import warnings

from tqdm import tqdm as terminal_bar

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tqdm calls its choice between the two experimental
    from tqdm.autonotebook import tqdm as fitting_bar


def bytes_bar(total: int | None, description: str) -> terminal_bar:
    """Return a bar that counts bytes; use it as a context manager and call `update(count)`."""
    in_notebook = fitting_bar is not terminal_bar
    return fitting_bar(
        total=total,
        desc=description,
        unit="B",
        unit_scale=True,
        leave=in_notebook,
        # Outside a notebook only a terminal shows the bar: a log gets no carriage returns.
        disable=False if in_notebook else None,
    )
