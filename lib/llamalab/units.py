"""Sizes as people write them, both ways."""

import re

from .errors import UsageError


def size_text(size: float) -> str:
    """Return `size` bytes as people read it, in powers of 1000: "13.5 GB", "3.6 MB"."""
    if size < 1000:
        return f"{size:,.0f} bytes"
    size, unit = size / 1000, "kB"
    for larger in ("MB", "GB"):
        if size >= 999.95:
            size, unit = size / 1000, larger
    return f"{size:,.1f} {unit}"


def parse_size(text: str | int) -> int:
    """Return bytes for "2GB", "500M", "1GiB" or a number; G is 1000**3, Gi 1024**3.

    Raises:
        UsageError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    size = 0
    if match and (match[2] or not match[3]):
        power = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size <= 0:
        raise UsageError(f"'{text}' is not a size.", "", "Write it as 2GB, 500MB or 1GiB.")
    return size
