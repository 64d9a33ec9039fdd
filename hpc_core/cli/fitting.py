"""Find the largest value whose memory fits, with few predictions, since each takes seconds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from hpc_core.case.errors import PredictError
from hpc_core.record.units import quantity

_BISECT_EVERY = 3
"""Interpolation may converge slowly on a curve, so every third step is a bisection."""
_FARTHEST = 8
"""A guess is at most this many times the largest value tried so far."""
_SLACK = 0.01
_SLACK_BYTES = 64 << 20
"""A peak may fall by this much at a larger value: allocators round to blocks, and kernels differ by shape."""


@dataclass
class Search:
    """The predictions so far."""

    room_bytes: int
    peaks: dict[int, int] = field(default_factory=dict)
    """Peak bytes by value, in the order of the predictions."""

    @property
    def fitting(self) -> int | None:
        """The largest value known to fit."""
        return max((value for value, peak in self.peaks.items() if peak <= self.room_bytes), default=None)

    @property
    def beyond(self) -> int | None:
        """The smallest value known not to fit."""
        return min((value for value, peak in self.peaks.items() if peak > self.room_bytes), default=None)


def largest_fitting(
    peak_of: Callable[[int], int], room_bytes: int, *, start: int, least: int, most: int, name: str = "value"
) -> Search:
    """Find the largest value from `least` to `most` whose peak is at most `room_bytes`, if there is one.

    Interpolate linearly, since memory mostly grows linearly, and bisect in between, so that the search ends after few
    predictions for any curve.

    Raises:
        PredictError: a larger value takes clearly less memory, so there is no largest one.
    """
    search = Search(room_bytes)
    guess: int | None = min(max(start, least), most)
    while guess is not None:
        search.peaks[guess] = peak_of(guess)
        _refuse_falling(search, name)
        guess = _next(search, least, most)
    return search


def _next(search: Search, least: int, most: int) -> int | None:
    low, high = search.fitting, search.beyond
    first = least if low is None else low + 1
    last = most if high is None else high - 1
    if first > last:
        return None
    if len(search.peaks) % _BISECT_EVERY and (guess := _straight(search)) is not None:
        return min(max(guess, first), last)
    if low is None:
        return first if first == last else (first + last) // 2
    return min(2 * low, last) if high is None else (first + last) // 2


def _straight(search: Search) -> int | None:
    """Return where a line through the two values nearest to the limit meets it."""
    known = sorted(search.peaks, key=lambda value: abs(search.peaks[value] - search.room_bytes))[:2]
    if len(known) < 2:
        return None
    (one, two) = sorted(known)
    rise = search.peaks[two] - search.peaks[one]
    if rise <= 0:
        return None
    guess = one + (search.room_bytes - search.peaks[one]) * (two - one) // rise
    return min(guess, _FARTHEST * max(search.peaks))


def _refuse_falling(search: Search, name: str) -> None:
    known = sorted(search.peaks)
    for small, large in itertools.pairwise(known):
        before, after = search.peaks[small], search.peaks[large]
        if after < before - max(_SLACK_BYTES, _SLACK * before):
            raise PredictError(
                f"{name}={large} would take less ({quantity(after, 'bytes')}) than {name}={small} ({quantity(before, 'bytes')}): "
                f"memory does not grow with {name} here, so there is no largest value. Compare values with --sweep {name}={small},{large}."
            )
