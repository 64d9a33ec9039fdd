"""What the prediction of any case shares: the fake GPU, the build, the bytes that it leaves, circumstances, record."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from hpc_core.audit import trainable_facts, weight_facts
from hpc_core.builders import Built, build
from hpc_core.faults.catalogue import inject
from hpc_core.faults.fault import Injection
from hpc_core.instruments.clock import quiet
from hpc_core.instruments.owners import owned_bytes, weight_tensors
from hpc_core.instruments.places import Places, following
from hpc_core.instruments.timeline import Timeline
from hpc_core.predict.fake_bitsandbytes import OUTLIERS
from hpc_core.predict.fake_gpu import fake_gpu
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.environment import circumstances
from hpc_core.record.gpus import Gpu, gpu_named
from hpc_core.record.job import Event, Job, Phase, Predict
from hpc_core.record.profile import Profile
from hpc_core.record.record import (
    Fact,
    Machine,
    MemoryTimeline,
    Metric,
    Record,
)
from hpc_core.worker.attributed import profile_of
from hpc_core.worker.metrics import measured_bytes, tensor_bytes

__all__ = ["MACHINE_KEY", "Prediction"]

MACHINE_KEY = "predicted"
"""Folder of the baselines of predictions."""


class Prediction:
    """One job being predicted. Collects metrics and audit; `record()` closes it."""

    def __init__(self, job: Job, emit: Callable[[Event], None], *, started: datetime.datetime):
        assert isinstance(job.kind, Predict)
        self._kind = job.kind
        self.case = job.case
        self.gpu: Gpu = gpu_named(job.kind.gpu)
        self.device = torch.device("cuda", 0)
        self.metrics: dict[str, Metric] = {}
        self.audit: dict[str, Fact] = {}
        self.notes: list[str] = []
        self.makers_at_peak: dict[str, int] = {}
        self.timeline: MemoryTimeline | None = None
        self.profile: Profile | None = None
        self.places = Places()
        self.injection: Injection | None = None if job.fault is None else inject(job.fault)
        self._job = job
        self._emit = emit
        self._started = started
        self._phase: str | None = None
        self._phase_began = 0.0
        self._phase_s: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """The prediction enters a phase: told to the launcher, and timed."""
        now = time.perf_counter()
        if self._phase is not None:
            self._phase_s[self._phase] = round(self._phase_s.get(self._phase, 0.0) + now - self._phase_began, 4)
        self._phase, self._phase_began = name, now
        self._emit(Phase(name))

    @contextlib.contextmanager
    def fake(self) -> Iterator[tuple[GpuWatch, ValuePolicy]]:
        """The fake GPU of this prediction, with garbage collected by reference counts alone, as in a timed step."""
        with fake_gpu(self.gpu) as (watch, policy), following() as self.places, quiet():
            watch.place = self.places.here
            yield watch, policy

    def build(self, watch: GpuWatch) -> Built:
        """Build the case's module; its bytes, and the peak while loading, become metrics."""
        self.phase("build")
        built = build(self.case, self.device)
        model = self.case.model
        if model is not None and model.drawn and model.sizes is not None:
            OUTLIERS.watch(built.model, model.sizes.hidden_size)
        peak = watch.allocator.peak_allocated
        self.metrics["peak_load_bytes"] = measured_bytes(peak, machine=True, gated=False)
        owned = weight_tensors(built.model)
        self.metrics["weights_bytes"] = tensor_bytes(owned_bytes(owned["weights"]))
        if owned["adapter"]:
            self.metrics["adapter_weights_bytes"] = tensor_bytes(owned_bytes(owned["adapter"]))
        return built

    def keep(self, timeline: Timeline, phases: Sequence[str], watch: GpuWatch, work: str = "one step") -> None:
        """What filled the step's highest point, and how it came to be where the job asks for that."""
        self.makers_at_peak = timeline.makers_at_peak()
        if self._kind.profile:
            self.profile = profile_of(work, phases, timeline, watch.uses, self.places)
        if self._kind.timeline:
            self.timeline = timeline.sampled(phases)

    def look(self, built: Built) -> None:
        """The facts that a model shows by itself: what is quantized, which dtypes, what trains."""
        self.phase("audit")
        self.audit |= weight_facts(self.case, built.model, self.notes)
        self.audit |= trainable_facts(self.case, built.model, self.notes)

    def record(self, watch: GpuWatch) -> Record:
        """Close the prediction."""
        self.phase("done")
        reserved = watch.allocator.peak_reserved
        note = "from the model of the allocator; depends on the order in which weights were loaded: low confidence"
        self.metrics["reserved_bytes"] = measured_bytes(reserved, machine=True, gated=False, note=note)
        reasons = [
            f"{name}: asked for {fact.asked!r}, saw {fact.seen!r}."
            for name, fact in self.audit.items()
            if not fact.holds
        ]
        reasons += self._fault_that_never_ran()
        build_of_torch = "a CUDA build without a GPU" if torch.version.cuda else "a CPU build"
        gpu: dict[str, Any] = {"predicted": self.gpu.name, "torch": build_of_torch}
        return Record(
            case=self.case,
            status="invalid" if reasons else "ok",
            metrics=dict(sorted(self.metrics.items())),
            audit=self.audit,
            reasons=tuple(reasons),
            makers_at_peak=self.makers_at_peak,
            timeline=self.timeline,
            profile=self.profile,
            circumstances=circumstances(
                "cpu",
                self._job.launched,
                fault=self._job.fault,
                started_at=self._started,
                where=Machine(key=MACHINE_KEY, name=self.gpu.name, memory_bytes=self.gpu.memory_bytes),
                gpu=gpu,
                phase_s=self._phase_s,
                notes=(f"predicted for one {self.gpu.name} by {build_of_torch} of torch", *self.notes),
            ),
        )

    def _fault_that_never_ran(self) -> list[str]:
        if self.injection is None:
            return []
        name, hits = self.injection.fault.name, self.injection.hits
        self.notes.append(f"the fault {name} was injected; its changed code ran {hits:,} times")
        unreached = f"The fault {name} was injected, but {self.case.id} never reaches the code that it changes: it proves nothing here."
        return [] if hits else [unreached]
