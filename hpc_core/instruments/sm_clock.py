"""Read the GPU's SM clock while work runs, from a thread of its own.

A power cap moves the clock within milliseconds, so one reading says little: of three processes of one LoRA step on an H200, one
read 1665 MHz and two 1965 MHz, and their busy times were within 0.7 %.
"""

from __future__ import annotations

import contextlib
import threading
import time
from types import TracebackType
from typing import Any, Self

from hpc_core.record.environment import visible_gpus
from hpc_core.record.findings import Findings
from hpc_core.record.gpu_state import Clock, ClockReader, clock_of_readings, clock_reader, throttle_words
from hpc_core.record.metrics import metric

INTERVAL_S = 0.004
"""Between two readings: fifty for a measurement of 0.2 s. The thread sleeps in between, and NVML runs without Python's lock."""


class ClockWatch:
    """Reads the clock of the first visible GPU while a `with` block runs. A second block forgets the readings of the first."""

    def __init__(self, interval_s: float = INTERVAL_S) -> None:
        self._interval_s = interval_s
        self.readings: list[tuple[int, int, int]] = []
        """When, in nanoseconds of `time.time_ns`; the clock in MHz; the throttle reasons."""
        self._limits: dict[str, Any] = {}
        self._stop = threading.Event()
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.readings, self._limits, self._stop = [], {}, threading.Event()
        gpus = visible_gpus()
        # Opening NVML takes milliseconds, so it is done before the work begins.
        if gpus:
            reader = self._open.enter_context(clock_reader(gpus[0]["index"]))
            self._limits = reader.limits()
            thread = threading.Thread(target=self._read, args=(reader,), name="SM clock", daemon=True)
            self._open.callback(thread.join)
            self._open.callback(self._stop.set)
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _read(self, reader: ClockReader) -> None:
        stopped = False
        while not stopped and (reading := reader.read()) is not None:
            self.readings.append((time.time_ns(), *reading))
            stopped = self._stop.wait(self._interval_s)

    def clock(self) -> Clock | None:
        """Return the clock of the last block; None without a GPU, or where its driver gives no clock."""
        return clock_of_readings([(mhz, reasons) for _, mhz, reasons in self.readings], **self._limits)


def clock_metric(clock: Clock) -> Findings:
    """Return `sm_clock_mhz`, the mean of the readings."""
    words = ", ".join(throttle_words(clock.reasons))
    lowered = f"; lowered by: {words} (the power cap in {clock.capped:.0%} of the readings)" if words else ""
    note = f"{clock.readings} readings from {clock.least_mhz} to {clock.most_mhz} MHz, median {clock.median_mhz:g}{lowered}"
    return Findings(metrics={"sm_clock_mhz": metric("sm_clock_mhz", clock.mean_mhz, on_gpu=True, note=note)})
