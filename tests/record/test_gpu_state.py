"""NVML's numbers in words: throttling, sharing and the setup of a GPU."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.record.gpu_state import clock_of, clock_of_readings, flags, setup_notes, throttle_words


@pytest.mark.parametrize(
    ("reasons", "words"),
    [
        (0x0, ()),
        (0x1, ()),  # idle
        (0x2, ()),  # fixed clocks alone slow nothing down
        (0x4, ("power cap",)),
        (0x8 | 0x40, ("hardware slowdown", "thermal slowdown by hardware")),
        (0x20, ("thermal slowdown by software",)),
        (0x80 | 0x1, ("power brake",)),
    ],
)
def test_throttle_reasons_are_words(reasons: int, words: tuple[str, ...]) -> None:
    """Only reasons that slow a busy GPU are named."""
    assert throttle_words(reasons) == words


CAPPED = msgspec.to_builtins(clock_of_readings([(1980, 0), (1560, 4), (1560, 4)], possible_mhz=1980, power_limit_w=700))


def states(*, before: dict[str, Any] | None = None, **busy: dict[str, Any]) -> dict[str, Any]:
    """The GPU part of a record's circumstances."""
    return {"before": before or {}, "busy": busy}


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ({}, ()),
        (states(before={"processes": 0}, during={"processes": 1, "throttle_reasons": 0}), ()),
        (states(during={"throttle_reasons": 4, "sm_clock_mhz": 1290}), ("throttled: power cap at 1290 MHz",)),
        (states(during={"throttle_reasons": 4}), ("throttled: power cap",)),
        (
            # What the readings meanwhile say counts, not the one after the launches.
            states(during={"throttle_reasons": 0, "sm_clock_mhz": 1980}, clock=CAPPED),
            ("throttled: power cap at 1700 MHz",),
        ),
        (
            states(before={"throttle_reasons": 4}, after={"throttle_reasons": 64}),
            (),  # throttled only outside the measurement
        ),
        (
            states(during={"throttle_reasons": 0}, after={"thermal_violation_ns": 5}),
            (),  # one reading of a counter is no difference
        ),
        (states(before={"processes": 2}, during={"processes": 3}), ("shared: 2 other processes on the GPU",)),
        (states(before={"processes": 0}, during={"processes": 2}), ("shared: 1 other process on the GPU",)),
        (states(before={"processes": 0}, during={"processes": 0}), ()),  # a container may hide even its own
    ],
)
def test_what_makes_a_busy_time_doubtful(gpu: dict[str, Any], expected: tuple[str, ...]) -> None:
    """Throttling during the measurement and other processes on the GPU are flagged."""
    assert flags(gpu) == expected


def test_a_slowdown_between_two_readings_is_seen() -> None:
    """A slowdown that no reading hit shows in NVML's violation counter."""
    busy = {
        "before": {"power_violation_ns": 1_000_000},
        "during": {"throttle_reasons": 0},
        "after": {"power_violation_ns": 31_000_000},
    }
    assert flags({"busy": busy}) == ("throttled: power limited the clock for 30 ms",)
    assert flags({"busy": busy | {"during": {"throttle_reasons": 4}}}) == ("throttled: power cap",)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({}, ()),
        ({"mig_mode": 0, "persistence_mode": 1, "throttle_reasons": 1}, ()),
        ({"mig_mode": 1}, ("MIG",)),
        ({"persistence_mode": 0}, ("persistence mode is off",)),
        ({"throttle_reasons": 0x102}, ("application clocks", "display clocks")),
    ],
)
def test_an_unusual_setup_is_noted(state: dict[str, Any], words: tuple[str, ...]) -> None:
    """MIG, no persistence and fixed clocks each give one note; a usual setup gives none."""
    notes = setup_notes(state)
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))


@given(st.lists(st.tuples(st.integers(210, 1980), st.sampled_from([0, 1, 4, 0x24])), min_size=1))
def test_the_clock_is_the_mean_of_its_readings(readings: list[tuple[int, int]]) -> None:
    """Cycles are the mean clock times the seconds; a record gives back what was read."""
    clock = clock_of_readings(readings, possible_mhz=1980)
    assert clock is not None
    assert clock.mean_mhz == pytest.approx(
        statistics.fmean(mhz for mhz, _ in readings), abs=0.0501
    )  # one decimal is kept
    assert clock.least_mhz <= clock.median_mhz <= clock.most_mhz
    assert (clock.capped > 0) == ("power cap" in throttle_words(clock.reasons))
    assert clock_of({"busy": {"clock": msgspec.to_builtins(clock)}}) == clock


@pytest.mark.parametrize(
    "gpu", [{}, {"busy": 3}, {"busy": {}}, {"busy": {"clock": None}}, {"busy": {"clock": {"readings": 2}}}]
)
def test_a_record_without_a_clock_has_none(gpu: dict[str, Any]) -> None:
    """Older records, and whatever a stranger wrote in its place, give no clock."""
    assert clock_of(gpu) is None
    assert clock_of_readings([(0, 0)]) is None
