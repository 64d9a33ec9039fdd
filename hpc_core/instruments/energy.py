"""Joules of repeated work, by a counter of millijoules that only grows. Knows neither NVML nor a device.

The counter is read at both ends and nothing in between, so that reading it costs the work nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from hpc_core.case.errors import MeasureError

__all__ = ["LEAST_S", "RENEWED_S", "Energy", "energy_of"]

LEAST_S = 2.0
"""Seconds that the work is repeated for at least: twenty renewals of the counter."""
RENEWED_S = 0.1
"""Seconds that a reading may be old. NVML's reference gives the counter no period; power readings of an H100 are renewed every 100 ms
(Yang, Adamek, Armour: Part-time Power Measurements, arXiv:2312.02741), and we take the counter to be no finer."""


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """What so many repetitions took."""

    joules: float
    seconds: float
    times: int

    @property
    def watts(self) -> float:
        """Mean power over the repetitions."""
        return self.joules / self.seconds

    @property
    def doubt(self) -> float:
        """By how much, as a share of itself, the energy may be off because both readings may be old."""
        return RENEWED_S / self.seconds


def energy_of(
    step: Callable[[], object],
    read_mj: Callable[[], int],
    *,
    least_s: float = LEAST_S,
    whole: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Energy of `step` repeated for at least `least_s` seconds and a multiple of `whole` times; it returns once its work is done.

    `whole` is for steps that differ, so that each of them is in as often as the others. `read_mj` gives millijoules since some moment long ago, `clock` seconds.

    Raises:
        MeasureError: the counter did not grow, or `read_mj` raises it.
    """
    first, began, times = read_mj(), clock(), 0
    while (seconds := clock() - began) < least_s or times % whole:
        step()
        times += 1
    grown = read_mj() - first
    if grown <= 0:
        raise MeasureError(
            f"The energy counter went from {first:,} to {first + grown:,} mJ over {seconds:.2f} s and {times} repetitions: "
            "it does not count here. Take no energy from this machine."
        )
    return Energy(joules=grown / 1000, seconds=seconds, times=times)
