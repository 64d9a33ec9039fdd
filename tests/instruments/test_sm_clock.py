"""Readings of the SM clock while work runs, of a GPU whose driver is made up."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.instruments import kernels, sm_clock
from hpc_core.instruments.kernels import DeviceActivity
from hpc_core.instruments.sm_clock import ClockWatch, clock_metric, share_of_clock
from hpc_core.record.findings import Findings
from hpc_core.record.gpu_state import clock_of_readings


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


@given(st.floats(1200, 1900), st.floats(1.02, 1.6), st.floats(0, 1), st.floats(0.001, 1))
def test_the_share_that_follows_the_clock_is_found(mhz: float, ratio: float, follows: float, seconds: float) -> None:
    """Two clocks and the two times of one step give the share; only cycles give 1, and time without them 0."""
    fast = (seconds, mhz * ratio)
    assert share_of_clock((seconds * ratio**follows, mhz), fast) == pytest.approx(follows, abs=1e-6)


@pytest.mark.parametrize(
    ("slow", "fast"),
    [
        ((0.05, 1965), (0.05, 1980)),
        ((0.05, 1980), (0.05, 1650)),
        ((0.07, 1650), (0.05, 1980)),
        ((0.04, 1650), (0.05, 1980)),
    ],
)
def test_times_that_no_clock_explains_give_no_share(slow: tuple[float, float], fast: tuple[float, float]) -> None:
    """Clocks too close together, the wrong way round, or times that differ by more than the clocks tell nothing."""
    assert share_of_clock(slow, fast) is None


class Capped:
    """An imaginary GPU at 1650 MHz while steps follow each other, and at 1980 MHz after a pause."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, alone_s: float, mhz: int = 1650) -> None:
        self.paused, self.profiled = False, list[int]()
        self._alone_s, self._mhz = alone_s, mhz
        monkeypatch.setattr(kernels, "device_activity", self._read)
        monkeypatch.setattr(kernels, "mark_step", lambda _: None)
        monkeypatch.setattr(kernels, "gpu_state", dict)
        monkeypatch.setattr(kernels, "ClockWatch", lambda: self)
        monkeypatch.setattr(time, "sleep", self._sleep)

    def _sleep(self, _: float) -> None:
        self.paused = True

    def clock(self) -> Any:
        """Return the clock of the last reading."""
        return clock_of_readings([(1980 if self.paused else self._mhz, 4)], possible_mhz=1980)

    def _read(self, work: Any, device: object, *, marked_steps: int = 1, watch: object) -> DeviceActivity:
        self.profiled.append(marked_steps)
        seconds = self._alone_s if self.paused else 0.05 * marked_steps
        return DeviceActivity(
            busy_s=seconds, stream_s={}, kernels=marked_steps, copies=0, memsets=0,
            kernel_s={}, kernel_counts={}, steps_alike=True,
        )  # fmt: skip


def measured(period: int = 1) -> Findings:
    program: Any = SimpleNamespace(period=period, step=lambda: None, phases=("step",))
    return kernels.busy_steps(program, torch.device("cuda", 0))


def test_a_lowered_clock_has_its_share_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three more steps, each after a pause, tell which share follows the clock; busy time itself stays what it was."""
    gpu = Capped(monkeypatch, alone_s=0.05 * (1650 / 1980) ** 0.8)
    metrics = measured().metrics
    assert metrics["clock_share"].value == pytest.approx(0.8)
    assert metrics["clock_share"].note == "50.000 ms at 1650 MHz in a row, 43.214 ms at 1980 MHz after a pause"
    assert (metrics["busy_s"].value, metrics["sm_clock_mhz"].value) == (0.05, 1650)
    assert gpu.profiled == [5, 1, 1, 1]


def test_a_share_that_does_not_show_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that the clocks do not explain leave a note in place of a share."""
    Capped(monkeypatch, alone_s=0.02)
    found = measured()
    assert "clock_share" not in found.metrics
    assert found.notes == (
        "no clock_share: a step took 50.000 ms at 1650 MHz in a row, 20.000 ms at 1980 MHz after a pause, which does not show it",
    )


def test_the_highest_clock_costs_no_further_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that nothing holds down, and one whose steps differ, take no further readings."""
    gpu = Capped(monkeypatch, alone_s=0.05, mhz=1980)
    assert "clock_share" not in measured().metrics
    assert gpu.profiled == [5]
