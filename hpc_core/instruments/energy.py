"""Measure the energy of a step or of a new token: the whole board's, over at least two seconds of repeated steps or queries.

Joules come from the board's cumulative counter of millijoules. It is read only at both ends, so it does not slow the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
import torch

from hpc_core.case.errors import MeasureError
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.program import Program
from hpc_core.record.environment import gpu_energy_mj, gpu_state
from hpc_core.record.findings import Findings
from hpc_core.record.gpu_state import other_processes
from hpc_core.record.metrics import metric
from hpc_core.record.record import Metric

LEAST_S = 2.0
"""Minimum seconds for which the work is repeated: twenty updates of the counter."""
RENEWED_S = 0.1
"""Maximum age of a reading in seconds. NVML's reference gives no period for the counter; power readings of an H100 are updated every
100 ms (Yang, Adamek, Armour: Part-time Power Measurements, arXiv:2312.02741), and we assume that the counter is no faster."""


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy and time of repeated work."""

    joules: float
    seconds: float
    times: int

    @property
    def watts(self) -> float:
        """Mean power over the repetitions."""
        return self.joules / self.seconds

    @property
    def uncertainty(self) -> float:
        """Relative error of the energy that the age of the readings may cause."""
        return RENEWED_S / self.seconds


def energy_of(
    step: Callable[[], object],
    read_mj: Callable[[], int],
    *,
    least_s: float = LEAST_S,
    whole: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Energy:
    """Measure the energy of `step`, repeated for at least `least_s` seconds and a multiple of `whole` times.

    If steps differ, `whole` makes all of them run equally often. `step` must return only after its work is done. `read_mj`
    reads a cumulative counter in millijoules, and `clock` seconds.

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
            "this machine's counter does not work. Do not measure energy on this machine."
        )
    return Energy(joules=grown / 1000, seconds=seconds, times=times)


_MOST_S = 4.0
"""Maximum seconds for one round of different steps or queries; if a round takes longer, the first ones represent all."""


def step_energy(
    program: Program, device: torch.device, *, step_s: Metric | None, gpu_before: Mapping[str, Any]
) -> Findings:
    """Measure `energy_step_j`, the joules per step, from the program's current step on.

    Args:
        program: what to run.
        device: a GPU; on a CPU nothing is measured.
        step_s: the measured time of a step. It decides whether a whole period fits.
        gpu_before: the GPU's state before this process used it.
    """

    def step() -> None:
        program.step()
        synchronize(device)

    energy, found = _measured(step, device, _round(step_s, program.period), gpu_before)
    if energy is None:
        return found
    note = coverage(energy, "steps", program.period)
    return Findings(metrics={"energy_step_j": metric("energy_step_j", energy.joules / energy.times, note=note)})


class _Answering(Program, Protocol):
    """A program whose steps are queries."""

    steps_done: int

    def answer_ids(self) -> list[list[int]]:
        """Return the new tokens of the last query, by row."""


def token_energy(
    program: _Answering, device: torch.device, *, query_s: Metric | None, gpu_before: Mapping[str, Any]
) -> Findings:
    """Measure `energy_token_j`, the joules per new token of all rows, prefill included. Arguments are those of `step_energy`."""
    made = 0

    def query() -> None:
        nonlocal made
        program.step()
        synchronize(device)
        made += sum(map(len, program.answer_ids()))

    program.steps_done = 0
    energy, found = _measured(query, device, _round(query_s, program.period), gpu_before)
    if energy is None:
        return found
    note = f"{made:,} new tokens, prefill included; {coverage(energy, 'queries', program.period)}"
    return Findings(metrics={"energy_token_j": metric("energy_token_j", energy.joules / made, note=note)})


def coverage(energy: Energy, what: str, period: int) -> str:
    """Describe what an energy covers; `period` is how many different steps or queries there are."""
    part = f" of {period:,} different ones" if energy.times % period else ""
    return (
        f"whole board, idle power not subtracted: {energy.joules:,.0f} J over {energy.seconds:.2f} s and {energy.times} {what}{part}, "
        f"{energy.watts:.0f} W; off by up to {energy.uncertainty:.0%} because the counter updates only every {RENEWED_S:g} s"
    )


def _round(timed: Metric | None, period: int) -> int:
    """Return how many steps or queries make a round, or 1 if a round takes longer than `_MOST_S`."""
    return period if timed is not None and timed.value * period <= _MOST_S else 1


def _measured(
    step: Callable[[], None], device: torch.device, whole: int, gpu_before: Mapping[str, Any]
) -> tuple[Energy | None, Findings]:
    """Measure repeated steps on a GPU; return None and a note if the board's counter does not describe them."""
    if device.type != "cuda":
        return None, Findings()
    if gpu_state().get("mig_mode"):
        return None, _none("the counter is the whole board's, and MIG gives this process only a part of it")
    try:
        with quiet():
            energy = energy_of(step, gpu_energy_mj, whole=whole)
    except MeasureError as error:
        return None, _none(str(error))
    others = other_processes(gpu_before, gpu_state())
    if others > 0:
        plural = "es" if others > 1 else ""
        return None, _none(f"the counter is the whole board's, and {others} other process{plural} used it too")
    return energy, Findings()


def _none(why: str) -> Findings:
    return Findings(notes=(f"no energy: {why}",))
