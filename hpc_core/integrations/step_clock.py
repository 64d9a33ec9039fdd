"""Seconds of training steps by the host's clock, without what happens between them. Pure: knows no trainer and no device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence


class StepClock:
    """Measures from one step's end to the next, loading of data included; what is said to be no training is left out."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.samples: list[float] = []
        """Seconds of each step that was kept, in order."""
        self.first_step_s: float | None = None
        """Seconds from the making of this clock to the first step's end."""
        self.left_out_s = 0.0
        """Seconds between steps that were no training: evaluation, saving, logging."""
        self._now = now
        self._made = now()
        self._since: float | None = None

    def training_goes_on(self) -> None:
        """What has happened since the last step's end was no training; the next step begins now."""
        now = self._now()
        if self._since is not None:
            self.left_out_s += now - self._since
        self._since = now

    def step_begins(self) -> None:
        """The first step begins here; later ones began when the one before them ended."""
        if self._since is None:
            self._since = self._now()

    def step_ended(self, *, keep: bool = True) -> None:
        """A step has ended; with `keep` its seconds are a sample."""
        now = self._now()
        if self.first_step_s is None:
            self.first_step_s = now - self._made
        if keep and self._since is not None:
            self.samples.append(now - self._since)
        self._since = now


def thinned(samples: Sequence[float], most: int) -> tuple[float, ...]:
    """At most so many of the samples, evenly spread, in their order; all of them where they are few.

    Raises:
        ValueError: fewer than one may be kept.
    """
    if most < 1:
        raise ValueError(f"At least one sample must be kept, not {most}.")
    if len(samples) <= most:
        return tuple(samples)
    return tuple(samples[index * len(samples) // most] for index in range(most))
