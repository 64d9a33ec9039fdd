"""Memory of a step by phase and by category, on GPU and CPU; memory of the process; memory that grows.

The gated peaks come from the allocator's counters in a pass without a recorder; the categories come from a second, recorded
pass. Reading and resetting the counters does not synchronize, so it does not change how a step runs.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch

from hpc_core.instruments.allocations import AllocatorHistory, StorageWatch
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.counters import compiled_graphs
from hpc_core.instruments.living import claiming
from hpc_core.instruments.owners import Bystanders, living_tensors, optimizer_tensors, owned_bytes, weight_tensors
from hpc_core.instruments.program import Mark, Program
from hpc_core.instruments.timeline import CATEGORIES, Timeline
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact, Metric

_SAMPLES = 20
_FLAT_BYTES = 64 * 1024
"""Libraries may keep a few scalars. A loss tensor that leaks in every step is 512 bytes on a GPU and shows after 128 steps."""


class PhasePeaks:
    """A mark that records the peak bytes of each phase in `peaks`."""

    def __init__(self, device: torch.device):
        self._device = device
        self._phase: str | None = None
        self.peaks: dict[str, int] = {}

    def __call__(self, phase: str) -> None:
        """Close the current phase, and open this one."""
        self.close()
        self._phase = phase

    def close(self) -> None:
        """Close the current phase."""
        peak = torch.cuda.max_memory_allocated(self._device)
        if self._phase is not None:
            self.peaks[self._phase] = max(peak, self.peaks.get(self._phase, 0))
        self._phase = None
        torch.cuda.reset_peak_memory_stats(self._device)


def peaks_of(program: Program, device: torch.device, steps: int) -> dict[str, int]:
    """Return the highest peak of each phase over `steps` steps, in bytes."""
    watch = PhasePeaks(device)
    watch.close()
    for _ in range(steps):
        program.step(watch)
        watch.close()
    return watch.peaks


class Watch(Protocol):
    """A recorder of allocations that is also the step's mark."""

    def __call__(self, phase: str) -> None:
        """Begin a phase."""

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Assign tensors that are alive now to a category."""


class _TensorWatch:
    """The CPU's recorder, with the interface of the allocator's history."""

    def __init__(self, watch: StorageWatch):
        self._watch = watch

    def __call__(self, phase: str) -> None:
        self._watch(phase)

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        self._watch.own(category, tensors)


Marking = Callable[[Watch], Mark]
"""Wraps a recorder to assign short-lived tensors to a category: gradients, a KV cache."""


def measure_memory(
    program: Program,
    device: torch.device,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    bystanders: Bystanders | None = None,
    marking: Marking | None = None,
    steps: int = 2,
    peaks: dict[str, int] | None = None,
    owned: Mapping[str, list[torch.Tensor]] | None = None,
    search: bool = False,
    timeline: bool = False,
) -> Findings:
    """Measure peaks by phase over `steps` steps, and categories over one.

    Args:
        program: runs its largest step. If steps differ, pass a `Fixed`: every pass must run the same step.
        device: where it runs.
        model: owns weights and adapter.
        optimizer: owns its state.
        bystanders: on a CPU, the storages that were alive before the first step.
        marking: assigns short-lived tensors to a category.
        steps: how many steps to take peaks over.
        peaks: peaks of an earlier pass; if None, the program runs `steps` steps for them.
        owned: tensors that the program itself owns, by category.
        search: find the owners among the models and optimizers that live in this process.
        timeline: also return the memory over the step.
    """
    owners = _owners(model, optimizer)
    for category, tensors in (owned or {}).items():
        owners[category] = owners.get(category, []) + tensors
    on_gpu = device.type == "cuda"
    if on_gpu:
        with quiet():
            peaks = peaks or peaks_of(program, device, steps)
        synchronize(device)
        events = _from_history(program, device, owners, marking, search=search)
    else:
        events = _from_storages(program, device, owners, marking, bystanders, search=search)
        peaks = events.peaks_by_phase(program.phases)
    return Findings(
        metrics=memory_metrics(peaks, events, on_gpu=on_gpu),
        timeline=events.sampled(program.phases) if timeline else None,
    )


def _owners(model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None) -> dict[str, list[torch.Tensor]]:
    owners = weight_tensors(model) if model is not None else {}
    if optimizer is not None:
        owners["optimizer"] = optimizer_tensors(optimizer)
    return owners


def memory_metrics(peaks: Mapping[str, int], timeline: Timeline, *, on_gpu: bool) -> dict[str, Metric]:
    """Return `peak_bytes`, the peak of each phase if there are several, and the bytes of each category at the peak."""
    values = {"peak_bytes": max(peaks.values())}
    if len(peaks) > 1:
        values |= {f"peak_{phase}_bytes": value for phase, value in peaks.items()}
    totals = timeline.at_peak()
    # These are requested bytes; the allocator rounds them up to its blocks.
    values |= {f"at_peak_{category}_bytes": totals[category] for category in CATEGORIES if totals[category]}
    if on_gpu:
        values["at_peak_rounding_bytes"] = max(values["peak_bytes"] - sum(totals.values()), 0)
    return {name: metric(name, value, on_gpu=on_gpu) for name, value in values.items()}


def model_metrics(model: torch.nn.Module) -> dict[str, Metric]:
    """Return the bytes of a model's weights, and of its adapter if it has one."""
    owned = {category: owned_bytes(tensors) for category, tensors in weight_tensors(model).items()}
    found = {"weights_bytes": metric("weights_bytes", owned["weights"])}
    if owned["adapter"]:
        found["adapter_weights_bytes"] = metric("adapter_weights_bytes", owned["adapter"])
    return found


def process_memory(device: torch.device) -> Findings:
    """Measure the memory of the process and of the GPU. Run it before the checks that need memory of their own."""
    metrics = {"host_peak_bytes": metric("host_peak_bytes", host_peak_bytes())}
    if device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        free, total = torch.cuda.mem_get_info(device)
        note = "all processes on the card, context included"
        metrics["reserved_bytes"] = metric("reserved_bytes", int(stats["reserved_bytes.all.peak"]))
        metrics["device_used_bytes"] = metric("device_used_bytes", total - free, note=note)
        metrics["allocator_retries"] = metric("allocator_retries", int(stats["num_alloc_retries"]))
    return Findings(metrics=metrics)


def host_peak_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the kernel reports KiB


def claim_before(
    device: torch.device,
    watch: StorageWatch,
    owners: Mapping[str, list[torch.Tensor]],
    bystanders: Bystanders | None,
) -> None:
    """Assign tensors that are alive before the step to categories; those without an owner are "other".

    Tensors that earlier steps left behind, such as a forgotten reference, count. Those that the process held before the first
    step count only if the step uses them: the peak must not depend on what else has run in this process.
    """
    alive = living_tensors(device)
    watch.own("other", alive if bystanders is None else bystanders.without(alive))
    for category, tensors in owners.items():
        watch.own(category, tensors)


def _from_history(
    program: Program,
    device: torch.device,
    owners: Mapping[str, list[torch.Tensor]],
    marking: Marking | None,
    *,
    search: bool,
) -> Timeline:
    history = AllocatorHistory(device, program.phases)
    mark: Mark = history if marking is None else marking(history)
    with quiet():
        history.start()
        for category, tensors in owners.items():
            history.own_before(category, tensors)
        with claiming(history.own_now) if search else contextlib.nullcontext():
            program.step(mark)
        synchronize(device)
        return history.stop()


def _from_storages(
    program: Program,
    device: torch.device,
    owners: Mapping[str, list[torch.Tensor]],
    marking: Marking | None,
    bystanders: Bystanders | None,
    *,
    search: bool,
) -> Timeline:
    watch = StorageWatch(program.phases)
    mark: Mark = watch if marking is None else marking(_TensorWatch(watch))
    with quiet():
        claim_before(device, watch, owners, bystanders)
        with watch, claiming(watch.claim) if search else contextlib.nullcontext():
            program.step(mark)
    return watch.timeline


class Growth:
    """Check whether memory grows over a long run of varying lengths, from twenty samples between steps."""

    def __init__(self, device: torch.device, steps: int):
        self._device, self._steps = device, steps
        self._every = max(1, steps // _SAMPLES)
        self._held: list[int] = []

    def after_step(self, done: int) -> None:
        """Take a sample after step number `done`, counted from 1, if one is due."""
        if done % self._every == 0:
            on_gpu = self._device.type == "cuda"
            held = torch.cuda.memory_allocated(self._device) if on_gpu else owned_bytes(living_tensors(self._device))
            self._held.append(held)

    def findings(self) -> Findings:
        """Return the growth from the first quarter of the samples to the last, as a fact and a metric."""
        quarter, on_gpu = max(1, len(self._held) // 4), self._device.type == "cuda"
        growth = min(self._held[-quarter:]) - max(self._held[:quarter])
        seen = "flat" if growth <= _FLAT_BYTES else f"+{growth:,} bytes over {self._steps} steps"
        made = metric("compilations", compiled_graphs(), note="graphs that torch.compile made in this process")
        metrics = {
            # The fact decides; the metric is for the reader.
            "held_growth_bytes": metric("held_growth_bytes", max(growth, 0), on_gpu=on_gpu),
            "compilations": made,
        }
        if on_gpu:
            share = torch.cuda.max_memory_allocated(self._device) / max(torch.cuda.memory_reserved(self._device), 1)
            note = "peak allocated over reserved; the rest is fragmentation"
            metrics["used_of_reserved"] = metric("used_of_reserved", share, note=note)
        return Findings(metrics=metrics, facts={"memory_growth": Fact(asked="flat", seen=seen)})
