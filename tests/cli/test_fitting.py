"""The search for the largest value that fits is right for any growing curve, and needs few predictions."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.case.errors import PredictError
from hpc_core.cli.fitting import largest_fitting


@given(
    rises=st.lists(st.integers(0, 1000), min_size=1, max_size=200),
    room=st.integers(0, 60_000),
    start=st.integers(-5, 250),
)
def test_it_finds_the_largest_that_fits(rises: list[int], room: int, start: int) -> None:
    """For any curve that does not fall, the result equals that of trying every value, after logarithmically many predictions."""
    peaks = dict(enumerate(itertools.accumulate(rises), start=1))
    search = largest_fitting(peaks.__getitem__, room, start=start, least=1, most=len(peaks))
    assert search.fitting == max((value for value, peak in peaks.items() if peak <= room), default=None)
    assert search.beyond == min((value for value, peak in peaks.items() if peak > room), default=None)
    assert len(search.peaks) <= 3 * (2 * math.log2(len(peaks)) + 2)


@given(
    fixed=st.integers(0, 40 << 30),
    each=st.integers(1 << 20, 4 << 30),
    room=st.integers(1, 80 << 30),
    start=st.integers(1, 64),
)
def test_linear_memory_takes_a_handful_of_predictions(fixed: int, each: int, room: int, start: int) -> None:
    """For linear memory, as in most cases, few predictions suffice, even if the largest value is in the thousands."""
    search = largest_fitting(lambda value: fixed + each * value, room, start=start, least=1, most=4096)
    assert search.fitting == (min(4096, (room - fixed) // each) if room >= fixed + each else None)
    assert len(search.peaks) <= 9


def test_it_does_not_go_beyond_the_most() -> None:
    """If every value fits, the last one tried is the upper bound."""
    search = largest_fitting(lambda value: 5, 10, start=4, least=1, most=100)
    assert (search.fitting, search.beyond) == (100, None)


def test_falling_memory_is_refused() -> None:
    """If a larger value clearly takes less memory, the search is refused, and the message says what to do."""
    with pytest.raises(PredictError, match=r"rank=8 would take less .* --sweep rank=4,8"):
        largest_fitting(lambda value: (20 - value) << 30, 40 << 30, start=4, least=1, most=100, name="rank")
