"""Measure a user's own step: wall time, peak memory, operators, FLOPs, GPU-busy time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpc_core.audit.own_step import OwnTraining
from hpc_core.case.workloads import CallableSpec
from hpc_core.engines.callable import CallableProgram
from hpc_core.instruments.attribution import profile_step
from hpc_core.instruments.clock import warm_up
from hpc_core.instruments.compilations import Compilations
from hpc_core.instruments.counters import counting
from hpc_core.instruments.energy import step_energy
from hpc_core.instruments.host import further_passes, step_cost
from hpc_core.instruments.host_time import host_times
from hpc_core.instruments.instrument import Instrument
from hpc_core.instruments.kernels import busy_steps
from hpc_core.instruments.memory import measure_memory, process_memory
from hpc_core.instruments.trace import trace_step
from hpc_core.instruments.wall import wall_steps
from hpc_core.instruments.wall_split import split_step
from hpc_core.record.findings import Findings
from hpc_core.record.job import Measure, Trace
from hpc_core.record.metrics import metric
from hpc_core.worker.place import Place


class OwnStep:
    """A user's own step, and its instruments."""

    def __init__(self, place: Place, step: Callable[[], Any] | None = None):
        """Load the step from the case's factory, unless `step` is given."""
        place.phases.enter("build")
        assert isinstance(place.case.workload, CallableSpec)
        self.place, self.device, self.steps = place, place.device, place.case.workload.steps
        self.compiled = Compilations.now()  # in the test's own process others have compiled before
        loaded = CallableProgram(step) if step is not None else place.engine.load(place.case, place.device, None)
        self.program, self.loaded = loaded, Findings()
        self.training = OwnTraining()

    def warm_up(self) -> Findings:
        """Run until memory and time are stable; the losses of these steps are the first ones."""
        self.training.begin()
        with self.training.watching_losses():
            return warm_up(self.program, self.device, self.place.began, after_step=self.training.after_call)

    def full(self, kind: Measure) -> Sequence[Instrument]:
        """Return all instruments: times before anything observes the step, and counts before the profiler loads libraries."""
        place, program, device = self.place, self.program, self.device
        joules = [Instrument("energy", "energy", self._energy)] if kind.profile and place.on_gpu else []
        # Last, because a step goes on with each call: what is measured does not depend on whether it is audited.
        audited = (
            [Instrument("audit", "audit", lambda _: self.training.observe(program.step, device))] if kind.audit else []
        )
        explained = (
            [
                Instrument("host's time", "profile", lambda _: host_times(program, device)),
                Instrument(
                    "split of time", None, lambda found: split_step(program, device, found.metrics["step_s"].value)
                ),
                Instrument("profile", None, self._profile),
            ]
            if kind.profile
            else []
        )
        return (
            Instrument("time", "measure", lambda _: wall_steps(program, device, self.steps)),
            # Later instruments change how many threads torch has, which its compiler guards.
            Instrument("compilations", None, lambda _: self.compiled.findings(device, gated=True)),
            Instrument("host's work", "host", lambda _: step_cost(program.step, on_gpu=place.on_gpu)),
            Instrument("further passes", None, lambda _: further_passes(program.step, on_gpu=place.on_gpu)),
            Instrument(
                "memory",
                "memory",
                lambda found: measure_memory(
                    program, device, bystanders=found.observed.get("bystanders"), search=True, timeline=kind.timeline
                ),
            ),
            Instrument("operators", "counters", self._count),
            Instrument("busy time", "busy", lambda _: busy_steps(program, device)),
            Instrument("busy share", None, _busy_share),
            *joules,
            Instrument("process memory", None, lambda _: process_memory(device)),
            *explained,
            *audited,
        )

    def retime(self) -> Sequence[Instrument]:
        """Return instruments for all times of host and device, and for launches."""
        return (
            Instrument("time", "measure", lambda _: wall_steps(self.program, self.device, self.steps)),
            Instrument("busy time", "busy", lambda _: busy_steps(self.program, self.device)),
            self._process_memory(),
        )

    def trace(self, kind: Trace) -> Sequence[Instrument]:
        """Return instruments that trace one step."""
        program, device, case_id = self.program, self.device, self.place.case.id
        run = Instrument("trace", "profile", lambda _: trace_step(program, device, kind, case_id))
        return (run, self._process_memory())

    def _process_memory(self) -> Instrument:
        return Instrument("process memory", None, lambda _: process_memory(self.device))

    def _count(self, found: Findings) -> Findings:
        with counting() as counts:
            self.program.step()
        on_gpu = self.place.on_gpu
        values = {"operators": counts.total, "flops": counts.flops}
        return Findings(metrics={name: metric(name, value, on_gpu=on_gpu) for name, value in values.items()})

    def _energy(self, found: Findings) -> Findings:
        timed = found.metrics["step_s"]
        return step_energy(self.program, self.device, step_s=timed, gpu_before=self.place.gpu_before)

    def _profile(self, found: Findings) -> Findings:
        return profile_step(
            self.program, self.device, "one step", bystanders=found.observed.get("bystanders"), search=True
        )


def _busy_share(found: Findings) -> Findings:
    if "busy_s" not in found.metrics:
        return Findings()
    share = found.metrics["busy_s"].value / found.metrics["step_s"].value
    return Findings(metrics={"busy_share": metric("busy_share", share)})
