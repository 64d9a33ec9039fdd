"""Read the state of a GPU through NVML, and describe what makes its times doubtful: throttling, MIG, other processes."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from hpc_core.case.errors import MeasureError

POWER_CAP = 0x4
_THROTTLES = {
    POWER_CAP: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by software",
    0x40: "thermal slowdown by hardware",
    0x80: "power brake",
}
"""Bits of nvmlClocksEventReasons (nvml.h) that slow down a busy GPU. An idle GPU and user-set clocks do not count."""
_SET_BY_USER = {0x2: "application clocks", 0x100: "display clocks"}


def throttle_words(reasons: int) -> tuple[str, ...]:
    """Return what lowers the clock of a busy GPU, by NVML's bit mask; empty for an idle GPU and user-set clocks."""
    return tuple(word for bit, word in _THROTTLES.items() if reasons & bit)


class Clock(msgspec.Struct, frozen=True, kw_only=True):
    """The SM clock while busy time was measured, in MHz, from readings a few milliseconds apart."""

    mean_mhz: float
    """Cycles are the mean times the seconds, however the clock moved in between; a median has no such law."""
    least_mhz: int
    median_mhz: float
    most_mhz: int
    readings: int
    reasons: int
    """All of NVML's throttle reasons that were read, as one bit mask."""
    capped: float
    """Share of the readings that the power cap lowered."""
    possible_mhz: int | None = None
    """The highest clock of this card."""
    power_limit_w: float | None = None


def clock_of_readings(
    readings: Sequence[tuple[int, int]], *, possible_mhz: int | None = None, power_limit_w: float | None = None
) -> Clock | None:
    """Return the clock of readings of MHz and throttle reasons, taken at equal intervals; None without a reading."""
    clocks = [mhz for mhz, _ in readings if mhz > 0]
    if not clocks:
        return None
    reasons = 0
    for _, bits in readings:
        reasons |= bits
    return Clock(
        mean_mhz=round(statistics.fmean(clocks), 1),
        least_mhz=min(clocks),
        median_mhz=statistics.median(clocks),
        most_mhz=max(clocks),
        readings=len(readings),
        reasons=reasons,
        capped=round(sum(bool(bits & POWER_CAP) for _, bits in readings) / len(readings), 3),
        possible_mhz=possible_mhz,
        power_limit_w=power_limit_w,
    )


def clock_of(gpu: Mapping[str, Any]) -> Clock | None:
    """Return the clock in a record's circumstances; None in a record without one, or with something else in its place."""
    busy = gpu.get("busy")
    try:
        return msgspec.convert(busy["clock"], Clock) if isinstance(busy, Mapping) and "clock" in busy else None
    except msgspec.ValidationError:
        return None


def flags(gpu: Mapping[str, Any]) -> tuple[str, ...]:
    """Return why to doubt a busy time: the clock was throttled, or the GPU was shared.

    `gpu` contains states of `read_state`: `before`, read before this process used the GPU, and in `busy` those `before`,
    `during` and `after` the measurement, and its `clock`. Any may be missing.
    """
    busy = gpu.get("busy", {})
    during, clock = busy.get("during", {}), clock_of(gpu)
    found = []
    words = throttle_words(int(during.get("throttle_reasons", 0)) | (0 if clock is None else clock.reasons))
    if words:
        mhz = during.get("sm_clock_mhz") if clock is None else round(clock.mean_mhz)
        found.append(f"throttled: {', '.join(words)}{'' if mhz is None else f' at {mhz} MHz'}")
    slowed = [(kind, _more(busy, f"{kind}_violation_ns")) for kind in ("power", "thermal")]
    found += [
        f"throttled: {kind} limited the clock for {ns / 1e6:.0f} ms" for kind, ns in slowed if ns > 0 and not words
    ]
    others = other_processes(gpu.get("before", {}), during)
    if others > 0:
        found.append(f"shared: {others} other process{'es' if others > 1 else ''} on the GPU")
    return tuple(found)


def other_processes(before: Mapping[str, Any], during: Mapping[str, Any]) -> int:
    """Return how many other processes use the GPU, by a state before this process used it and one while it does."""
    return max(int(before.get("processes", 0)), int(during.get("processes", 1)) - 1)


def _more(busy: Mapping[str, Any], name: str) -> int:
    """Return how much a counter grew during the measurement; 0 if it was not read."""
    before, after = busy.get("before", {}).get(name), busy.get("after", {}).get(name)
    return 0 if before is None or after is None else int(after) - int(before)


def setup_notes(state: Mapping[str, Any]) -> tuple[str, ...]:
    """Return notes on the GPU's setup that affect its times: MIG, no persistence mode, user-set clocks."""
    notes = []
    if state.get("mig_mode"):
        notes.append("the GPU is split by MIG: its times are those of one slice")
    if state.get("persistence_mode") == 0:
        notes.append(
            "the GPU's persistence mode is off: the driver may unload between processes (nvidia-smi -pm 1 turns it on)"
        )
    notes += [
        f"the GPU's {word} are set by the user"
        for bit, word in _SET_BY_USER.items()
        if int(state.get("throttle_reasons", 0)) & bit
    ]
    return tuple(notes)


def read_state(index: int) -> dict[str, Any]:
    """Return the current state of NVML's GPU number `index`. Readings that its driver does not provide are left out.

    `throttle_reasons` is NVML's bit mask, `*_violation_ns` how long the clock was limited since the driver was loaded.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        state: dict[str, Any] = {}
        for name, read in _readings(pynvml, handle).items():
            # A virtual machine may hide some sensors, and an old driver may lack a function.
            with contextlib.suppress(pynvml.NVMLError):
                state[name] = read()
        return state
    finally:
        pynvml.nvmlShutdown()


def read_energy_mj(index: int) -> int:
    """Return the millijoules that the board of NVML's GPU number `index`, memory included, consumed since its driver was loaded.

    Source: nvmlDeviceGetTotalEnergyConsumption in NVIDIA's NVML reference; Volta or newer.

    Raises:
        MeasureError: this GPU or driver has no energy counter, or hides it.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(index)))
    except pynvml.NVMLError as error:
        raise MeasureError(f"NVML gives no energy counter of GPU {index} ({error}).") from error
    finally:
        pynvml.nvmlShutdown()


class ClockReader:
    """Reads the clock of one GPU again and again. NVML stays open between the readings, so that each takes microseconds."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> tuple[int, int] | None:
        """Return the SM clock in MHz, and the throttle reasons as NVML's bit mask; None where the driver gives no clock."""
        nvml, handle = self._nvml, self._handle
        with contextlib.suppress(nvml.NVMLError):
            clock = int(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM))
            return clock, int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        return None

    def limits(self) -> dict[str, Any]:
        """Return `possible_mhz` and `power_limit_w`, as far as the driver provides them."""
        nvml, handle = self._nvml, self._handle
        found: dict[str, Any] = {}
        with contextlib.suppress(nvml.NVMLError):
            found["possible_mhz"] = int(nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
        with contextlib.suppress(nvml.NVMLError):
            found["power_limit_w"] = round(nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000, 1)
        return found


@contextlib.contextmanager
def clock_reader(index: int) -> Iterator[ClockReader]:
    """Open NVML's GPU number `index` for readings of its clock."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield ClockReader(pynvml, pynvml.nvmlDeviceGetHandleByIndex(index))
    finally:
        pynvml.nvmlShutdown()


def _readings(nvml: Any, handle: Any) -> dict[str, Callable[[], Any]]:
    return {
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "power_w": lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1),
        "throttle_reasons": lambda: int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        "power_violation_ns": lambda: _violation_ns(nvml, handle, nvml.NVML_PERF_POLICY_POWER),
        "thermal_violation_ns": lambda: _violation_ns(nvml, handle, nvml.NVML_PERF_POLICY_THERMAL),
        "used_bytes": lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
        "processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
        "mig_mode": lambda: int(nvml.nvmlDeviceGetMigMode(handle)[0]),
        "persistence_mode": lambda: int(nvml.nvmlDeviceGetPersistenceMode(handle)),
    }


def _violation_ns(nvml: Any, handle: Any, policy: int) -> int:
    return int(nvml.nvmlDeviceGetViolationStatus(handle, policy).violationTime)
