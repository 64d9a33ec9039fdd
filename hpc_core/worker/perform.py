"""Perform a job: build, run and measure one case in this process, and return its record.

Exceptions propagate; `hpc_core.worker.main` turns them into records.
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
from hpc_core.instruments.host import as_after_compiling
from hpc_core.instruments.instrument import Instrument, Phases, observe
from hpc_core.instruments.machine import measure_machine
from hpc_core.record.environment import circumstances, gpu_state
from hpc_core.record.findings import Findings, mismatches
from hpc_core.record.gpu_state import flags, setup_notes
from hpc_core.record.job import Event, Job, Measure, MeasureCeilings, Retime, Trace
from hpc_core.record.record import Record
from hpc_core.worker.callable import OwnStep
from hpc_core.worker.finetune import Training
from hpc_core.worker.generate import Generation
from hpc_core.worker.place import Place, choose_device


class Workload(Protocol):
    """A loaded case, and its instruments by kind of job."""

    @property
    def program(self) -> Program:
        """The program that runs."""

    @property
    def loaded(self) -> Findings:
        """Findings from building and loading."""

    def warm_up(self) -> Findings:
        """Run until memory and time are stable."""

    def full(self, kind: Measure) -> Sequence[Instrument]:
        """Return all instruments."""

    def retime(self) -> Sequence[Instrument]:
        """Return instruments for all times of host and device, and for launches."""

    def trace(self, kind: Trace) -> Sequence[Instrument]:
        """Return instruments that trace one fixed step."""


_WORKLOADS: dict[str, Callable[..., Workload]] = {
    "generate": Generation,
    "finetune": Training,
    "callable": OwnStep,
}


def perform(job: Job, emit: Callable[[Event], None], *, began: float | None = None, step: Any = None) -> Record:
    """Measure this job's case in this process, and return its record.

    Args:
        job: any kind of job except a prediction.
        emit: called with each phase as it begins.
        began: when this process began to import what it needs, by `time.perf_counter`.
        step: a callable to measure instead of the one that the case's factory would build.

    Raises:
        HpcCoreError: the case cannot be built or run as asked.
        Exception: anything that the code under test raises.
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
    return judged(found.record(job.case, around))  # INVALID if no hardware can reach its numbers


def _perform(
    job: Job, device: torch.device, phases: Phases, began: float, gpu_before: dict[str, Any], step: Any
) -> Findings:
    """Run the job's case and return its findings, with audit mismatches and proof that an injected fault was reached."""
    case = job.case
    if case.model is not None and case.model.tiny and job.launched != "inline":
        # Synchronizing threads costs more than a tiny product, and ten times as much on a busy machine.
        torch.set_num_threads(1)
    as_after_compiling()
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
    faults = in_place()
    if not faults:
        return Findings()
    why = f"The fault {faults[0]}, injected by an earlier case of this process, is still in place. Run this case in its own process, not inline."
    return Findings(reasons=(why,))


def _state_of_others() -> dict[str, Any]:
    """Return the GPU's state without this process, which may have used it already for an earlier inline case."""
    state = gpu_state()
    if torch.cuda.is_initialized() and state.get("processes"):
        state["processes"] -= 1
    return state
