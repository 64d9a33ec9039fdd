"""Energy of a step or of a new token: the whole board's, over two seconds of the steps or queries that were timed before.

Joules come from a counter of millijoules that only grows. It is read at both ends and nothing in between, so that reading it
costs the work nothing.
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


_MOST_S = 10.0
"""What a whole round of unlike steps or queries may take; beyond it the first ones represent the others."""


def step_energy(
    program: Program, device: torch.device, *, step_s: Metric | None, gpu_before: Mapping[str, Any]
) -> Findings:
    """Measure `energy_step_j`: joules of a step. Steps go on from where the program stands.

    Args:
        program: to be run.
        device: a GPU; on a CPU nothing is found.
        step_s: the measured time of a step, by which it is decided whether a whole period is run.
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
        """The new tokens of the last query, by row."""


def token_energy(
    program: _Answering, device: torch.device, *, query_s: Metric | None, gpu_before: Mapping[str, Any]
) -> Findings:
    """Measure `energy_token_j`: joules of a query over its new tokens of all rows, prefill included. Arguments as `step_energy`."""
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
    """Say what a number covers; `period` is how many unlike steps or queries there are."""
    part = f" of {period:,} unlike ones" if energy.times % period else ""
    return (
        f"whole board, idle power not subtracted: {energy.joules:,.0f} J over {energy.seconds:.2f} s and {energy.times} {what}{part}, "
        f"{energy.watts:.0f} W; the readings' age alone may move it by {energy.doubt:.0%}"
    )


def _round(timed: Metric | None, period: int) -> int:
    """How many steps or queries make a round, where that takes no more than ten seconds."""
    return period if timed is not None and timed.value * period <= _MOST_S else 1


def _measured(
    step: Callable[[], None], device: torch.device, whole: int, gpu_before: Mapping[str, Any]
) -> tuple[Energy | None, Findings]:
    """Joules of repeated steps on a GPU; None, with a note that says why, where the board's counter does not stand for them."""
    if device.type != "cuda":
        return None, Findings()
    if gpu_state().get("mig_mode"):
        return None, _none("the counter is of the whole board, and MIG gives this process a slice")
    try:
        with quiet():
            energy = energy_of(step, gpu_energy_mj, whole=whole)
    except MeasureError as error:
        return None, _none(str(error))
    others = other_processes(gpu_before, gpu_state())
    if others > 0:
        plural = "es" if others > 1 else ""
        return None, _none(f"the counter is of the whole board, and {others} other process{plural} used it too")
    return energy, Findings()


def _none(why: str) -> Findings:
    return Findings(notes=(f"no energy: {why}",))
