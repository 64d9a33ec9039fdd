"""Perform a job: build, run and measure one case in this process, and return its record.

Knows nothing of processes, baselines and judging. Exceptions are the worker's to turn into records.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch

from hpc_core.bounds.check import judged
from hpc_core.case.errors import MissingLibraryError
from hpc_core.engines.engine import Program, engine_of
from hpc_core.faults.catalogue import in_place, inject
from hpc_core.instruments.instrument import Instrument, Phases, observe
from hpc_core.instruments.machine import measure_machine
from hpc_core.record.environment import circumstances, gpu_state
from hpc_core.record.findings import Findings, mismatches
from hpc_core.record.gpu_state import flags, setup_notes
from hpc_core.record.job import Event, Job, Measure, MeasureCeilings, Repeat, Retime, Trace
from hpc_core.record.record import Record
from hpc_core.worker.callable import OwnStep
from hpc_core.worker.finetune import Training
from hpc_core.worker.generate import Generation
from hpc_core.worker.place import Place, choose_device


class Workload(Protocol):
    """A loaded case, and what is measured of it by kind of job."""

    @property
    def program(self) -> Program:
        """What runs."""

    @property
    def loaded(self) -> Findings:
        """What building and loading showed."""

    def warm_up(self) -> Findings:
        """Run until memory and time have settled."""

    def full(self, kind: Measure) -> Sequence[Instrument]:
        """Everything."""

    def repeat(self) -> Sequence[Instrument]:
        """Busy time and launches; on a CPU wall time."""

    def retime(self) -> Sequence[Instrument]:
        """Every time, of the host and of the device."""

    def trace(self, kind: Trace) -> Sequence[Instrument]:
        """A profile for the eye, of one step that is always the same."""


_WORKLOADS: dict[str, Callable[..., Workload]] = {
    "generate": Generation,
    "finetune": Training,
    "callable": OwnStep,
}


def perform(job: Job, emit: Callable[[Event], None], *, began: float | None = None, step: Any = None) -> Record:
    """Return the record of this job's case, measured here and now.

    Args:
        job: of any kind but a prediction.
        emit: hears each phase as it begins.
        began: when this process began to import what it needs, by `time.perf_counter`.
        step: a callable to measure in place of the one that the case's factory would build.

    Raises:
        HpcCoreError: the case cannot be built or run as asked.
        Exception: whatever the code under test raises.
    """
    started = datetime.datetime.now(datetime.UTC)
    began = time.perf_counter() if began is None else began
    phases = Phases(emit, began)
    device = choose_device(job.case, job.device)
    gpu: dict[str, Any] = {"before": _state_of_others()} if device.type == "cuda" else {}
    ceilings, canary = job.ceilings, dict[str, float]()
    if isinstance(job.kind, MeasureCeilings):
        phases.enter("ceilings")
        ceilings, canary, found = measure_machine(device, canary=job.kind.canary)
    else:
        found = _perform(job, device, phases, began, gpu.get("before", {}), step)
    phases.enter("done")
    if device.type == "cuda":
        gpu |= {"after": gpu_state(), "cuda": str(torch.version.cuda)}
        if "gpu_busy" in found.observed:
            gpu["busy"] = found.observed["gpu_busy"]
        state = [f"GPU {flag}" for flag in flags(gpu)]
        found |= Findings(notes=(*state, *setup_notes(gpu["after"])))
    kind: Literal["cpu", "cuda"] = "cuda" if device.type == "cuda" else "cpu"
    around = circumstances(
        kind,
        job.launched,
        ceilings=ceilings,
        canary=canary,
        fault=job.fault,
        started_at=started,
        gpu=gpu,
        phase_s=phases.seconds(),
        notes=found.notes,
    )
    return judged(found.record(job.case, around))  # what no hardware can reach is no result


def _perform(
    job: Job, device: torch.device, phases: Phases, began: float, gpu_before: dict[str, Any], step: Any
) -> Findings:
    """What a job found that runs its case: with the verdict of the audit, and proof that an injected fault was reached."""
    case = job.case
    if case.model is not None and case.model.shape == "tiny" and job.launched != "inline":
        # Threads that wait for each other cost more than a tiny product, on a busy machine ten times as much.
        torch.set_num_threads(1)
    found = _left_faults()
    injection = None if job.fault is None else inject(job.fault)
    engine = engine_of(case)
    if (why := engine.missing(case, device)) is not None:
        raise MissingLibraryError(why)
    place = Place(case, engine, device, phases, began, gpu_before, job.ceilings, faulty=injection is not None)
    workload = _WORKLOADS[case.kind](place, *([] if step is None else [step]))
    try:
        found |= workload.loaded
        phases.enter("warm-up")
        found |= workload.warm_up()
        match job.kind:
            case Measure() as options:
                instruments = workload.full(options)
            case Repeat():
                instruments = workload.repeat()
            case Retime():
                instruments = workload.retime()
            case Trace() as trace:
                instruments = workload.trace(trace)
            case _:
                raise AssertionError(f"{job.kind} is not performed here")
        found = observe(instruments, workload.program, phases, found)
        phases.enter("record")
    finally:
        workload.program.close()
    found |= Findings(reasons=mismatches(found.facts))
    if isinstance(job.kind, Measure) and not job.kind.audit:
        why = "The audit was switched off: what ran was not checked, so its numbers prove nothing."
        found |= Findings(reasons=(why,))
    if injection is not None:
        found |= injection.findings(case.id)
    return found


def _left_faults() -> Findings:
    left = in_place()
    if not left:
        return Findings()
    why = f"The fault {left[0]}, injected by an earlier case of this process, is still in place. Run this case in a process of its own: not inline."
    return Findings(reasons=(why,))


def _state_of_others() -> dict[str, Any]:
    """The GPU's state before this process uses it. Inline, an earlier case of this very process already has."""
    state = gpu_state()
    if torch.cuda.is_initialized() and state.get("processes"):
        state["processes"] -= 1
    return state
