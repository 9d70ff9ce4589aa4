"""Sizes, both ways: one grammar for every option."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalab.errors import UsageError
from llamalab.units import parse_size, size_text


@pytest.mark.parametrize(
    "text, size",
    [("7", 7), (7, 7), ("2GB", 2 * 10**9), ("500M", 5 * 10**8), ("1GiB", 2**30), ("4 kB", 4000)]
    + [("1.5g", 15 * 10**8), ("3Ti", 3 * 2**40), ("10B", 10), (" 2 Mb ", 2 * 10**6)],
)
def test_sizes_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "GB", "1XB", "1iB", "1,5GB", "0.2", "1 2", "1e9"])
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@given(st.integers(1, 10**15))
def test_what_is_shown_is_read_again(size):
    shown = size_text(size).replace(",", "").replace(" bytes", "")
    assert abs(parse_size(shown) - size) <= size * 0.051
