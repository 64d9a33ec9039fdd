"""Where a case is predicted, and what all workloads share: the build, the memory, and the facts of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hpc_core.audit.model import weight_facts
from hpc_core.audit.training import trainable_facts
from hpc_core.builders.assemble import Built, build
from hpc_core.case.case import Case
from hpc_core.engines.engine import Engine
from hpc_core.instruments.attribution import profile_of
from hpc_core.instruments.instrument import Phases
from hpc_core.instruments.memory import memory_metrics, model_metrics
from hpc_core.instruments.places import Places
from hpc_core.instruments.timeline import Timeline
from hpc_core.predict.fake_bitsandbytes import OUTLIERS
from hpc_core.predict.policy import ValuePolicy
from hpc_core.predict.watch import GpuWatch
from hpc_core.record.findings import Findings
from hpc_core.record.job import Predict
from hpc_core.record.metrics import metric

DEVICE = torch.device("cuda", 0)


@dataclass(frozen=True)
class Place:
    """One job's case, and the fake GPU that it runs on."""

    case: Case
    engine: Engine
    kind: Predict
    phases: Phases
    watch: GpuWatch
    policy: ValuePolicy
    modules: Places


def build_model(place: Place) -> tuple[Built, Findings]:
    """Build the case's module; return it, its bytes, and the peak while it was loaded."""
    place.phases.enter("build")
    built = build(place.case, DEVICE)
    model, quantization = place.case.model, place.case.quantization
    int8 = quantization is not None and quantization.kind == "int8"
    if int8 and model is not None and model.drawn and model.sizes is not None:
        OUTLIERS.watch(built.model, model.sizes.hidden_size)
    return built, load_peak(place) | Findings(metrics=model_metrics(built.model))


def load_peak(place: Place) -> Findings:
    """Return the highest memory so far."""
    return Findings(metrics={"peak_load_bytes": metric("peak_load_bytes", place.watch.allocator.peak_allocated)})


def memory_of(
    place: Place, peaks: dict[str, int], timeline: Timeline, phases: Sequence[str], work: str = "one step"
) -> Findings:
    """Return memory by phase and category, the largest allocations at the peak, and the profile and timeline if the job asks for them."""
    note = "tensors and scratch as requested, without the allocator's rounding"
    requested = metric("peak_requested_bytes", timeline.peak()[1], note=note)
    profile = profile_of(work, phases, timeline, place.watch.uses, place.modules) if place.kind.profile else None
    return Findings(
        metrics=memory_metrics(peaks, timeline, on_gpu=True) | {"peak_requested_bytes": requested},
        makers_at_peak=timeline.makers_at_peak(),
        profile=profile,
        timeline=timeline.sampled(phases) if place.kind.timeline else None,
    )


def audit(place: Place, built: Built) -> Findings:
    """Return the facts of the model that need no values: quantized layers, dtypes, trainable parameters."""
    return weight_facts(place.case, built.model) | trainable_facts(place.case, built.model)
