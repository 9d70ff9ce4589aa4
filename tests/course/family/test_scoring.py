"""CJK share, exact answers and intervals against counts made by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamalab_course.family.scoring import cjk_share, exact, first_line, wilson_interval


@pytest.mark.parametrize(
    "text, share",
    [
        ("苹果是植物", 1.0),
        ("an apple", 0.0),
        ("苹果 ab", 0.5),
        ("", None),
        ("123 !? 。，", None),
        ("㐀龥豈𠀀", 1.0),
        ("カタ", 0.0),
        ("é苹", 0.5),
    ],
)
def test_cjk_share(text, share):
    assert cjk_share(text) == share


@given(st.text(), st.text())
def test_cjk_share_is_a_mean_over_letters(a, b):
    def letters(text):
        return sum(c.isalpha() for c in text)

    both = cjk_share(a + b)
    counted = [(cjk_share(t), letters(t)) for t in (a, b) if letters(t)]
    if not counted:
        assert both is None
    else:
        mean = sum(s * n for s, n in counted) / sum(n for _, n in counted)
        assert both == pytest.approx(mean)


def test_lines_and_exactness():
    assert first_line("  A cow eats grass.\nWhat next?") == "A cow eats grass."
    assert exact(" 牛吃草。\n", "牛吃草。") and not exact("牛吃草", "牛吃草。")


def test_wilson_interval_against_published_values():
    # 81 of 263: 0.2553 to 0.3662 (Newcombe, Statistics in Medicine 17, 1998, method 3)
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    low, high = wilson_interval(0, 20)
    assert (low, high) == pytest.approx((0.0, 0.1611), abs=1e-4)
    with pytest.raises(ValueError):
        wilson_interval(0, 0)


@given(st.integers(1, 10**4), st.data())
def test_the_interval_holds_the_share(total, data):
    right = data.draw(st.integers(0, total))
    low, high = wilson_interval(right, total)
    assert 0 <= low <= right / total + 1e-12 and right / total - 1e-12 <= high <= 1
