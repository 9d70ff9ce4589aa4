"""Notebooks made for one test."""

from __future__ import annotations

import nbformat
from nbformat import v4

PARAMETERS = (
    'name: str = "x"  # a name\nseed: int = 1  # a seed\nwarm: bool = False\nheat: float = 0.5'
)


def notebook(path, *cells, parameters=PARAMETERS):
    """Write a notebook whose first cell declares `parameters`; return its path."""
    book = v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.cells = [v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    book.cells += [v4.new_code_cell(cell) for cell in cells]
    nbformat.write(book, path)
    return path
