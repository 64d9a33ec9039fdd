"""Wall samples into pytest-benchmark, by its public surface: a timer of our own, and `pedantic`. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

__all__ = ["ReplayTimer", "replay", "with_timer"]

_TIMER = pytest.StashKey["ReplayTimer"]()


class ReplayTimer:
    """Tells recorded durations as if they passed between two calls: 0, first sample, 0, second sample."""

    __name__ = "replayed"  # pytest-benchmark prints a timer's name

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """Tell these durations next."""
        self._readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def __call__(self) -> float:
        """The next reading; 0 once all are told."""
        return next(self._readings, 0.0)


def with_timer(item: pytest.Item, group: str) -> None:
    """Give a test its replaying timer, and its group unless its author has chosen one."""
    timer = item.stash[_TIMER] = ReplayTimer()
    own = item.get_closest_marker("benchmark")
    said = {"group": group} | ({} if own is None else dict(own.kwargs))
    # The closest marker wins and the others are not read at all, so it carries the author's arguments too.
    item.add_marker(pytest.mark.benchmark(**(said | {"timer": timer})), append=False)


def replay(item: pytest.Item, benchmark: Any, samples: Sequence[float]) -> None:
    """Make these samples the rounds of this test's benchmark. Does nothing where pytest-benchmark is disabled."""
    if samples and benchmark.enabled:
        item.stash[_TIMER].load(samples)
        benchmark.pedantic(_nothing, rounds=len(samples))


def _nothing() -> None:
    """What pytest-benchmark believes to time."""
