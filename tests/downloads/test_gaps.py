"""The arithmetic of what is missing, beside a plain set of byte positions."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llamalab.downloads.gaps import Gap, Gaps

SIZE = 60
positions = st.sets(st.integers(0, SIZE - 1))


def spans_of(missing: set[int]) -> list[list[int]]:
    """Return the stretches that a set of positions makes, as pairs (start, stop)."""
    starts = sorted(n for n in missing if n - 1 not in missing)
    stops = sorted(n + 1 for n in missing if n + 1 not in missing)
    return [[start, stop] for start, stop in zip(starts, stops, strict=True)]


def positions_in(gaps) -> set[int]:
    return {n for gap in gaps for n in range(gap.start, gap.stop)}


def length_of(missing: set[int]) -> int:
    """Return the length of a file that ends behind its last byte that is here."""
    return max(set(range(SIZE)) - missing, default=-1) + 1


@given(positions)
def test_what_was_written_down_comes_back(missing):
    gaps = Gaps.after(spans_of(missing), SIZE, length_of(missing))
    assert gaps.spans() == spans_of(missing) and positions_in(gaps) == missing


@given(positions, st.integers(0, SIZE))
@example(missing={58, 59}, more=2)
def test_the_length_says_how_far_the_gap_has_come_in_which_the_file_ends(missing, more):
    length = length_of(missing) + more
    if length > SIZE:
        with pytest.raises(ValueError):
            Gaps.after(spans_of(missing), SIZE, length)
        return
    # All behind the last byte that is here is one gap, which was filled from its front.
    filled = set(range(length_of(missing), length))
    assert positions_in(Gaps.after(spans_of(missing), SIZE, length)) == missing - filled


@given(positions.filter(lambda missing: len(missing) < SIZE), st.data())
def test_a_file_that_lacks_bytes_said_to_be_here_is_refused(missing, data):
    length = data.draw(st.integers(0, length_of(missing) - 1))
    with pytest.raises(ValueError):
        Gaps.after(spans_of(missing), SIZE, length)


@pytest.mark.parametrize(
    "missing",
    [[[5, 3]], [[-1, 3]], [[0, SIZE + 1]], [[5, 9], [2, 3]], [[0, 9], [8, 12]], [[0.0, 9]]]
    + [[["0", 9]], [[0]], [[0, 1, 2]], [None], [7], None, 7, "no gaps"],
)
def test_nonsense_is_no_gap(missing):
    with pytest.raises((ValueError, TypeError)):
        Gaps.after(missing, SIZE, SIZE)


@given(positions, st.integers(1, SIZE))
def test_pieces_hold_the_same_bytes_and_join_again(missing, piece):
    gaps = Gaps(Gap(*span) for span in spans_of(missing))
    gaps.split(piece)
    assert positions_in(gaps) == missing
    assert sum(gap.stop - gap.start for gap in gaps) == len(missing)
    assert all(gap.stop - gap.start <= piece for gap in gaps)
    again = Gaps.after(gaps.spans(), SIZE, length_of(missing))
    assert again.spans() == spans_of(missing)


@given(positions, st.integers(1, SIZE), st.lists(st.integers(0, 9), max_size=80))
def test_whoever_takes_a_gap_fills_it_alone_and_from_its_front(missing, piece, steps):
    gaps = Gaps(Gap(*span) for span in spans_of(missing))
    gaps.split(piece)
    left, taken = set(missing), []
    for step in steps:
        if step > 6 or not taken:
            free = [gap for gap in gaps if not gap.taken]
            gap = gaps.take()
            assert gap is (free[0] if free else None)
            assert gap is None or (gap.taken and gap not in taken)
            taken += [gap] if gap else []
        elif step == 6:
            taken.pop().taken = False  # another may have it
        else:
            gap = taken.pop(0)
            count = min(step, gap.stop - gap.start)
            left -= set(range(gap.start, gap.start + count))
            filled = gaps.fill(gap, count)
            assert filled == (gap.start == gap.stop) == (gap not in gaps)
            taken += [] if filled else [gap]
        assert positions_in(gaps) == left
        assert gaps.spans() == sorted(gaps.spans())


@given(st.integers(0, SIZE), st.integers(0, SIZE), st.integers(1, SIZE))
def test_a_file_whose_size_is_not_known_has_one_gap_without_an_end(here, more, piece):
    gaps = Gaps([Gap(here, None)])
    gaps.split(piece)
    assert gaps.spans() == [[here, None]] and not gaps.fill(gaps.take(), more)
    gaps.end_at(here + more)  # nothing more comes
    assert len(gaps) == 0
    gaps = Gaps([Gap(here, None)])
    gaps.end_at(here + more)
    assert positions_in(gaps) == set(range(here, here + more)) and len(gaps) == bool(more)
