"""Scoring an answer: the share of Chinese in it, and whether it is exactly right."""

import math

CJK_RANGES = ((0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x10FFFF))
"""Code points counted as Chinese: the CJK ideographs of Unicode, extensions included."""


def cjk_share(text: str) -> float | None:
    """Return the share of letters (`str.isalpha`) in `text` that are CJK, in [0, 1].

    None when the text holds no letters: an empty or purely numeric answer is in no language.
    """
    letters = [character for character in text if character.isalpha()]
    if not letters:
        return None
    cjk = sum(any(low <= ord(c) <= high for low, high in CJK_RANGES) for c in letters)
    return cjk / len(letters)


def first_line(text: str) -> str:
    """Return `text` to its first line break, stripped: a base model runs on after its answer."""
    return text.strip().split("\n", 1)[0].strip()


def exact(answer: str, expected: str) -> bool:
    """Whether `answer` is `expected`, white space at both ends aside."""
    return answer.strip() == expected.strip()


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the Wilson score interval of the share `right / total` (95 % at the default z).

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical
    inference", JASA 22 (1927). It stays inside [0, 1] also for 0 or all right.

    Raises:
        ValueError: `total` is not positive.
    """
    if total <= 0:
        raise ValueError("an interval needs at least one sample")
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total)
    half *= math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)
