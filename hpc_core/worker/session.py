"""What the measuring of any case shares: device, phases, build, warm-up, peaks, busy time, circumstances, record."""

from __future__ import annotations

import contextlib
import datetime
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import _disable_current_modes

from hpc_core.audit import module_facts, value_facts, weight_facts
from hpc_core.bounds.check import judged
from hpc_core.builders import Built, build
from hpc_core.case.errors import MeasureError, SpecError
from hpc_core.faults.fault import Injection
from hpc_core.instruments.clock import quiet, seconds_of, synchronize
from hpc_core.instruments.kernels import DeviceActivity, device_activity
from hpc_core.instruments.machine import measure_canary, measure_ceilings
from hpc_core.instruments.owners import Bystanders, owned_bytes, weight_tensors
from hpc_core.instruments.program import Program
from hpc_core.record.environment import circumstances, gpu_state
from hpc_core.record.gpu_state import flags, setup_notes
from hpc_core.record.job import Event, Job, Measure, MeasureCeilings, Phase
from hpc_core.record.profile import Profile
from hpc_core.record.record import (
    Fact,
    KernelFamily,
    MemoryTimeline,
    Metric,
    Record,
)
from hpc_core.worker.metrics import measured_bytes, reported, tensor_bytes

__all__ = ["Session", "choose_device"]

_WARMUP_MOST = 8
_PERIOD_MOST = 12
"""Of a long period only so many steps warm up; the rest brings widths that are new, not kernels."""
_SETTLED_RATIO = 1.25
"""A step counts as warm when it takes less than this times the fastest so far."""


def choose_device(job: Job) -> torch.device:
    """Where the job runs.

    Raises:
        SpecError: it needs a CUDA GPU and there is none.
    """
    has_cuda = torch.cuda.is_available()
    wanted = job.device if job.device != "auto" else ("cuda" if has_cuda and job.case.scale != "tiny" else "cpu")
    if (wanted == "cuda" or job.case.needs_gpu) and not has_cuda:
        built = f"torch {torch.__version__} sees no CUDA GPU"
        raise SpecError(
            f"{job.case.id} needs a CUDA GPU, but {built}. Run it on a GPU box, or take a tiny or small case."
        )
    return torch.device("cuda", 0) if wanted == "cuda" else torch.device("cpu")


class Session:
    """One job being performed. Collects metrics, audit and reasons; `record()` closes it."""

    def __init__(self, job: Job, emit: Callable[[Event], None], *, started: datetime.datetime, began: float):
        self.job = job
        self.kind = job.kind
        self.options = job.kind if isinstance(job.kind, Measure) else Measure(profile=False)
        self.case = job.case
        self.device = choose_device(job)
        self.on_gpu = self.device.type == "cuda"
        if self.case.model is not None and self.case.model.shape == "tiny" and job.launched != "inline":
            # Threads that wait for each other cost more than a tiny product, on a busy machine ten times as much.
            torch.set_num_threads(1)
        self.metrics: dict[str, Metric] = {}
        self.audit: dict[str, Fact] = {}
        self.reasons: list[str] = []
        self.notes: list[str] = []
        self.timeline: MemoryTimeline | None = None
        self.profile: Profile | None = None
        self.losses: list[float] = []
        self.answers: list[str] = []
        self.bystanders: Bystanders | None = None
        """On a CPU, what was alive before the first step."""
        self.injection: Injection | None = None
        self.kernel_families: dict[str, KernelFamily] = {}
        self._emit = emit
        self._started = started
        self._began = began
        self._phase: str | None = "import"
        self._phase_began = began
        self._phase_s: dict[str, float] = {}
        self._gpu: dict[str, Any] = {"before": _state_of_others()} if self.on_gpu else {}

    @property
    def gpu_before(self) -> dict[str, Any]:
        """The GPU's state before this process used it; {} on a CPU."""
        found: dict[str, Any] = self._gpu.get("before", {})
        return found

    def phase(self, name: str) -> None:
        """The worker enters a phase: told to the launcher, and timed."""
        now = time.perf_counter()
        if self._phase is not None:
            self._phase_s[self._phase] = self._phase_s.get(self._phase, 0.0) + now - self._phase_began
        self._phase, self._phase_began = name, now
        self._emit(Phase(name))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Look at a pass that is being counted: no counter sees what runs in the block, and its time is the audit's."""
        synchronize(self.device)
        began = time.perf_counter()
        with _disable_current_modes():
            yield
        synchronize(self.device)
        took = time.perf_counter() - began
        self._phase_s["audit"] = self._phase_s.get("audit", 0.0) + took
        self._phase_began += took

    def build(self) -> Built:
        """Build the case's module; its peak while loading, its bytes and the host's peak become metrics."""
        self.phase("build")
        if self.on_gpu:
            torch.cuda.init()
            torch.cuda.reset_peak_memory_stats(self.device)
        built = build(self.case, self.device)
        synchronize(self.device)
        if self.on_gpu:
            # Where weights are drawn or read depends on library and path, so this peak is shown and never gated.
            peak = torch.cuda.max_memory_allocated(self.device)
            self.metrics["peak_load_bytes"] = measured_bytes(peak, machine=True, gated=False)
        self.metrics["host_peak_load_bytes"] = measured_bytes(_host_peak_bytes(), machine=True, gated=False)
        owned = weight_tensors(built.model)
        self.metrics["weights_bytes"] = tensor_bytes(owned_bytes(owned["weights"]))
        if owned["adapter"]:
            self.metrics["adapter_weights_bytes"] = tensor_bytes(owned_bytes(owned["adapter"]))
        return built

    def warm_up(self, program: Program, watch: Callable[[], None] | None = None, *, first_steps: int = 0) -> None:
        """Run until memory and time have settled: equal peaks twice in a row, and a step about as fast as the fastest.

        `watch` is called after every step. With shapes that change from step to step a whole period is run first. The program's
        `first_steps` compile, tune or capture: they settle nothing, and what they took becomes `first_use_s`.
        """
        self.phase("warm-up")
        if not self.on_gpu:
            self.bystanders = Bystanders(self.device)
        seconds: list[float] = []
        peaks: list[int] = []
        least = first_steps + min(max(2, program.period), _PERIOD_MOST)
        while len(seconds) < least + _WARMUP_MOST:
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats(self.device)
            seconds.append(seconds_of(program.step, self.device))
            peaks.append(torch.cuda.max_memory_allocated(self.device) if self.on_gpu else 0)
            if len(seconds) == 1:
                self.metrics["cold_start_s"] = reported(
                    time.perf_counter() - self._began, "s", note="from the worker's start to its first finished step"
                )
            if len(seconds) == first_steps:
                note = f"{first_steps} steps that compile, tune and capture"
                self.metrics["first_use_s"] = reported(sum(seconds), "s", note=note)
            if watch is not None:
                watch()
            # Steps of different widths differ in peak and time by right: having seen a period of them is all there is.
            alike = len(set(peaks[-2:])) == 1 and seconds[-1] < _SETTLED_RATIO * min(seconds)
            if len(seconds) >= least and (alike or program.period > 1):
                return
        self.notes.append(
            f"warm-up did not settle in {len(seconds)} steps: peaks {sorted(set(peaks[-3:]))}, last steps {seconds[-3:]} s"
        )

    @contextlib.contextmanager
    def timing(self) -> Iterator[None]:
        """A timed phase: garbage collected before, not during."""
        self.phase("measure")
        with quiet():
            yield

    def busy(self, work: Callable[[], None], *, marked_steps: int = 0) -> DeviceActivity | None:
        """What the device did in `work`; None on a CPU, or with a reason when the profiler's reading is void."""
        if not self.on_gpu:
            return None
        states = {"before": gpu_state()}

        def watched() -> None:
            work()
            # Everything is launched and most of it still runs: the clock and what holds it down are those of the work.
            states["during"] = gpu_state()

        try:
            return device_activity(watched, self.device, marked_steps=marked_steps)
        except MeasureError as error:
            self.reasons.append(str(error))
            return None
        finally:
            self._gpu["busy"] = {**states, "after": gpu_state()}

    def audit_model(self, model: torch.nn.Module) -> None:
        """Facts of the live model that every workload shares: how and what its weights are, and whose code it runs."""
        self.audit |= weight_facts(self.case, model, self.notes)
        self.audit |= value_facts(self.case, model, self.notes)
        tuned = getattr(self.case.workload, "engine", "stock") != "stock"
        self.audit |= module_facts(model, self.notes, own_code=tuned or self.injection is not None)

    def machine(self, kind: MeasureCeilings) -> Record:
        """Measure the machine instead of the case: its ceilings, and the canary where it is asked for."""
        self.phase("ceilings")
        ceilings = measure_ceilings(self.device)
        canary = {}
        try:
            canary = measure_canary(self.device) if kind.canary else {}
        except MeasureError as error:
            self.notes.append(f"no canary: {error}")
        return self._close(ceilings=ceilings, canary=canary)

    def record(self) -> Record:
        """Close the session: memory of the process, clocks after, and the record of all that was collected."""
        self.phase("record")
        self.note_process_memory()
        return self._close(ceilings=self.job.ceilings)

    def note_process_memory(self) -> None:
        """What the process and the card hold, once: what is done for the sake of checking comes after it and is not in it."""
        if "host_peak_bytes" in self.metrics:
            return
        self.metrics["host_peak_bytes"] = measured_bytes(_host_peak_bytes(), machine=True, gated=False)
        if self.on_gpu:
            stats = torch.cuda.memory_stats(self.device)
            reserved = int(stats["reserved_bytes.all.peak"])
            self.metrics["reserved_bytes"] = measured_bytes(reserved, machine=True, gated=False)
            free, total = torch.cuda.mem_get_info(self.device)
            self.metrics["device_used_bytes"] = measured_bytes(
                total - free, machine=True, gated=False, note="all processes on the card, context included"
            )
            self.metrics["allocator_retries"] = reported(int(stats["num_alloc_retries"]), "1")

    def _prove_fault(self) -> None:
        if self.injection is None:
            return
        name, hits = self.injection.fault.name, self.injection.hits
        self.notes.append(f"the fault {name} was injected; its changed code ran {hits:,} times")
        if not hits:
            self.reasons.append(
                f"The fault {name} was injected, but {self.case.id} never reaches the code that it changes: it proves nothing here."
            )

    def _close(self, *, ceilings: dict[str, float], canary: dict[str, float] | None = None) -> Record:
        for name, fact in self.audit.items():
            if not fact.holds:
                self.reasons.append(f"{name}: asked for {fact.asked!r}, saw {fact.seen!r}.")
        if not self.options.audit:
            self.reasons.append("The audit was switched off: what ran was not checked, so its numbers prove nothing.")
        self._prove_fault()
        self.phase("done")
        if self.on_gpu:
            self._gpu |= {"after": gpu_state(), "cuda": str(torch.version.cuda)}
            self.notes += [f"GPU {flag}" for flag in flags(self._gpu)] + list(setup_notes(self._gpu["after"]))
        kind: Literal["cpu", "cuda"] = "cuda" if self.on_gpu else "cpu"
        record = Record(
            case=self.case,
            status="invalid" if self.reasons else "ok",
            metrics=dict(sorted(self.metrics.items())),
            audit=self.audit,
            reasons=tuple(self.reasons),
            timeline=self.timeline,
            profile=self.profile,
            losses=tuple(self.losses),
            answers=tuple(self.answers),
            kernel_families=self.kernel_families,
            circumstances=circumstances(
                kind,
                self.job.launched,
                ceilings=ceilings,
                canary=canary or {},
                fault=self.job.fault,
                started_at=self._started,
                gpu=self._gpu,
                phase_s={name: round(value, 4) for name, value in self._phase_s.items()},
                notes=tuple(self.notes),
            ),
        )
        return judged(record)  # what cannot be is no result


def _state_of_others() -> dict[str, Any]:
    """The GPU's state before this process uses it. Inline, an earlier case of this very process already has."""
    state = gpu_state()
    if torch.cuda.is_initialized() and state.get("processes"):
        state["processes"] -= 1
    return state


def _host_peak_bytes() -> int:
    """The highest resident memory of this process so far; the kernel counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
