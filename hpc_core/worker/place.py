"""Where a case runs, and what all workloads share: choose a device, build the model, check it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hpc_core.audit.model import module_facts, value_facts, weight_facts
from hpc_core.builders.assemble import Built, build
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.engines.engine import Engine
from hpc_core.instruments.clock import synchronize
from hpc_core.instruments.instrument import Phases
from hpc_core.instruments.memory import host_peak_bytes, model_metrics
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric


@dataclass(frozen=True)
class Place:
    """The case of one job, and where it runs."""

    case: Case
    engine: Engine
    device: torch.device
    phases: Phases
    began: float
    """When this process began, by `time.perf_counter`."""
    gpu_before: Mapping[str, Any]
    """The GPU's state before this process used it; {} on a CPU."""
    ceilings: Mapping[str, float]
    """The machine's highest rates, measured earlier in the session."""
    faulty: bool
    """True if a fault was injected; the audit then accepts code of `hpc_core` in the model."""

    @property
    def on_gpu(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"


def choose_device(case: Case, device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """Return where the case runs; "auto" selects a GPU if there is one, but a CPU for tiny cases.

    Raises:
        SpecError: the case needs a CUDA GPU and there is none.
    """
    has_cuda = torch.cuda.is_available()
    wanted = device if device != "auto" else ("cuda" if has_cuda and case.scale != "tiny" else "cpu")
    if (wanted == "cuda" or case.needs_gpu) and not has_cuda:
        built = f"torch {torch.__version__} sees no CUDA GPU"
        raise SpecError(
            f"{case.id} needs a CUDA GPU, but {built}. Run it on a GPU machine, or choose a tiny or small case."
        )
    return torch.device("cuda", 0) if wanted == "cuda" else torch.device("cpu")


def build_model(place: Place) -> tuple[Built, Findings]:
    """Build the case's module; return it, its bytes, and the peaks of device and host while it was loaded."""
    place.phases.enter("build")
    metrics = {}
    if place.on_gpu:
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(place.device)
    built = build(place.case, place.device)
    synchronize(place.device)
    if place.on_gpu:
        # This peak depends on how the library draws or reads weights, so it is shown but not gated.
        metrics["peak_load_bytes"] = metric("peak_load_bytes", torch.cuda.max_memory_allocated(place.device))
    metrics["host_peak_load_bytes"] = metric("host_peak_load_bytes", host_peak_bytes())
    return built, Findings(metrics=metrics | model_metrics(built.model))


def model_facts(place: Place, model: torch.nn.Module) -> Findings:
    """Return the facts of the live model that every workload shares: what its weights are, and whose code it runs."""
    own = {"hpc_core", type(place.engine).__module__.partition(".")[0]}
    also = own if place.engine.own_code or place.faulty else ()
    return weight_facts(place.case, model) | value_facts(place.case, model) | module_facts(model, also=also)
