"""Readings of the SM clock while work runs, of a GPU whose driver is made up."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from hpc_core.instruments import sm_clock
from hpc_core.instruments.sm_clock import ClockWatch, clock_metric


class Driver:
    """NVML of an imaginary GPU: the power cap lowers its clock from the second reading on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, hides: bool = False) -> None:
        self.opened, self.read, self._hides = 0, 0, hides
        self.enough = threading.Event()
        monkeypatch.setattr(sm_clock, "visible_gpus", lambda: ({"index": 0},))
        made = {
            "nvmlInit": lambda: self._open(1),
            "nvmlShutdown": lambda: self._open(-1),
            "nvmlDeviceGetHandleByIndex": lambda index: SimpleNamespace(index=index),
            "nvmlDeviceGetClockInfo": self._clock,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0 if self.read < 2 else 4,
            "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
            "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        }
        for name, function in made.items():
            monkeypatch.setattr(pynvml, name, function)

    def _open(self, by: int) -> None:
        self.opened += by

    def _clock(self, *_: Any) -> int:
        if self._hides:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        self.read += 1
        if self.read > 3:
            self.enough.set()
        return 1980 if self.read < 2 else 1650


def test_the_clock_is_read_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings begin with the block and end with it; NVML is open just as long, and a second block begins anew."""
    driver = Driver(monkeypatch)
    watch = ClockWatch(interval_s=0.0001)
    for _ in range(2):
        driver.read = 0
        driver.enough.clear()
        with watch:
            assert driver.opened == 1
            assert driver.enough.wait(30)
        clock = watch.clock()
        assert driver.opened == 0
        assert clock is not None
        assert clock.readings == driver.read >= 4
        assert (clock.least_mhz, clock.most_mhz) == (1650, 1980)
        assert (clock.possible_mhz, clock.power_limit_w) == (1980, 700.0)
    assert not any(thread.name == "SM clock" for thread in threading.enumerate())


def test_the_metric_says_how_far_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric is shown and not judged, one value a process; its note has the range, the median and what lowered it."""
    driver = Driver(monkeypatch)
    with ClockWatch(interval_s=0.0001) as watch:
        assert driver.enough.wait(30)
    clock = watch.clock()
    assert clock is not None
    metric = clock_metric(clock).metrics["sm_clock_mhz"]
    assert (metric.gated, metric.unit, metric.noise) == (False, "MHz", "busy")
    assert metric.note is not None
    assert "from 1650 to 1980 MHz, median 1650; lowered by: power cap" in metric.note


def test_without_a_clock_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hides the clock, and a machine without a GPU, give no clock and no error."""
    Driver(monkeypatch, hides=True)
    with ClockWatch() as watch:
        pass
    assert watch.clock() is None
    monkeypatch.setattr(sm_clock, "visible_gpus", tuple)
    with ClockWatch() as watch:
        pass
    assert watch.clock() is None
