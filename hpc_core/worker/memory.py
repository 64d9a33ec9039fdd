"""Memory of a step by phase and by category, on GPU and CPU, as metrics.

The gated peaks come from the allocator's counters in an undisturbed pass; the categories from a second, recorded pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

from hpc_core.bounds.footprint import unexplained_bytes
from hpc_core.instruments.allocations import AllocatorHistory, StorageWatch
from hpc_core.instruments.clock import quiet, synchronize
from hpc_core.instruments.owners import living_tensors, optimizer_tensors, weight_tensors
from hpc_core.instruments.phases import peaks_of
from hpc_core.instruments.program import Mark, Program, unmarked
from hpc_core.instruments.timeline import CATEGORIES, Timeline
from hpc_core.record.record import Metric
from hpc_core.worker.metrics import measured_bytes, tensor_bytes
from hpc_core.worker.session import Session

__all__ = ["Fixed", "Watch", "claim_before", "measure_memory", "memory_metrics", "note_unexplained", "peak_metrics"]


class _Cyclic(Program, Protocol):
    """A program that says, and can be told, where in its data it stands."""

    steps_done: int


class Fixed:
    """A program that does the same step of another one again and again, so that every pass sees the same shapes."""

    period = 1

    def __init__(self, program: _Cyclic, index: int):
        self._program, self._index = program, index
        self.phases = program.phases

    def step(self, mark: Mark = unmarked) -> None:
        """The step at this index of the program's data."""
        self._program.steps_done = self._index
        self._program.step(mark)


class Watch(Protocol):
    """A recorder of allocations that also takes the step's marks."""

    def __call__(self, phase: str) -> None:
        """A phase begins."""

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        """Say who owns tensors that live now."""


class _TensorWatch:
    """The CPU's recorder, with the allocator history's face."""

    def __init__(self, watch: StorageWatch):
        self._watch = watch

    def __call__(self, phase: str) -> None:
        self._watch(phase)

    def own_now(self, category: str, tensors: Iterable[torch.Tensor]) -> None:
        self._watch.own(category, tensors)


def measure_memory(
    session: Session,
    program: Program,
    model: torch.nn.Module | None,
    optimizer: torch.optim.Optimizer | None,
    *,
    marking: Callable[[Watch], Mark] | None = None,
    steps: int = 2,
    peaks: dict[str, int] | None = None,
    owned: Mapping[str, list[torch.Tensor]] | None = None,
) -> None:
    """Measure peaks by phase over `steps` steps and categories over one, into the session's metrics.

    The caller gives its largest step, as `Fixed` where steps differ: every pass must see the same one. `marking` may wrap the
    recorder, to name owners that only live for a while (gradients, KV cache). `peaks` are those of a pass that was
    watched already; without them the program is run for them. `owned` are tensors of the program's own, by category.
    """
    session.phase("memory")
    owners = weight_tensors(model) if model is not None else {}
    if optimizer is not None:
        owners["optimizer"] = optimizer_tensors(optimizer)
    for category, tensors in (owned or {}).items():
        owners[category] = owners.get(category, []) + tensors
    if session.on_gpu:
        with quiet():
            peaks = peaks or peaks_of(program, session.device, steps)
        synchronize(session.device)
        timeline = _from_history(session, program, owners, marking)
    else:
        timeline = _from_storages(session, program, owners, marking)
        peaks = timeline.peaks_by_phase(program.phases)
    session.metrics |= memory_metrics(peaks, timeline, on_gpu=session.on_gpu)
    if session.options.timeline:
        session.timeline = timeline.sampled(program.phases)


def peak_metrics(peaks: dict[str, int], *, on_gpu: bool) -> dict[str, Metric]:
    """`peak_bytes`, and the peaks of the phases where there are several."""
    metrics = {"peak_bytes": measured_bytes(max(peaks.values()), machine=on_gpu)}
    if len(peaks) > 1:
        metrics |= {f"peak_{phase}_bytes": measured_bytes(value, machine=on_gpu) for phase, value in peaks.items()}
    return metrics


def memory_metrics(peaks: dict[str, int], timeline: Timeline, *, on_gpu: bool) -> dict[str, Metric]:
    """`peak_bytes`, the peaks of several phases, and the bytes of each category at the timeline's highest point."""
    metrics = peak_metrics(peaks, on_gpu=on_gpu)
    totals = dict(timeline.at_peak())
    for category in CATEGORIES:
        if totals[category]:
            # At the step's highest point, by requested bytes; the allocator rounds up to its blocks beyond that.
            # On a CPU "other" holds scalars that libraries keep alive; the peak, which counts them, is gated.
            gated = on_gpu or category != "other"
            metrics[f"at_peak_{category}_bytes"] = measured_bytes(totals[category], machine=on_gpu, gated=gated)
    if on_gpu:
        rounding = int(metrics["peak_bytes"].value) - sum(totals.values())
        metrics["at_peak_rounding_bytes"] = measured_bytes(max(rounding, 0), machine=True, gated=False)
    return metrics


def note_unexplained(session: Session, *, cached_tokens: int | None = None) -> None:
    """`unexplained_bytes`: what weights, adapter, gradients, optimizer state and KV cache take beside their closed forms.

    Too little is as odd as too much, and must not hide it, so the differences are added without their signs. Activations and temporaries
    have no closed form; what nobody owns at the peak has a metric of its own, `at_peak_other_bytes`.
    """
    measured = {name: int(metric.value) for name, metric in session.metrics.items() if name.endswith("_bytes")}
    differences = unexplained_bytes(session.case, measured, cached_tokens=cached_tokens)
    if not differences:
        return
    odd = [f"{name.removesuffix('_bytes')} {value:+,}" for name, value in sorted(differences.items()) if value]
    note = "measured minus closed form: " + (", ".join(odd) or f"equal in {len(differences)} categories")
    total = sum(abs(value) for value in differences.values())
    session.metrics["unexplained_bytes"] = tensor_bytes(total, note=note)


def _from_history(session: Session, program: Program, owners: dict[str, list[torch.Tensor]], marking: Any) -> Timeline:
    history = AllocatorHistory(session.device, program.phases)
    mark: Mark = history if marking is None else marking(history)
    with quiet():
        history.start()
        for category, tensors in owners.items():
            history.own_before(category, tensors)
        program.step(mark)
        synchronize(session.device)
        return history.stop()


def _from_storages(session: Session, program: Program, owners: dict[str, list[torch.Tensor]], marking: Any) -> Timeline:
    watch = StorageWatch(program.phases)
    mark: Mark = watch if marking is None else marking(_TensorWatch(watch))
    with quiet():
        claim_before(session, watch, owners)
        with watch:
            program.step(mark)
    return watch.timeline


def claim_before(session: Session, watch: StorageWatch, owners: dict[str, list[torch.Tensor]]) -> None:
    """Say whose the tensors are that live before the step; those of nobody are "other".

    What the steps before left behind, a forgotten reference for one, counts; what the process held before them does not, unless the
    step uses it: the peak must not depend on what else has run here.
    """
    left = living_tensors(session.device)
    watch.own("other", left if session.bystanders is None else session.bystanders.without(left))
    for category, tensors in owners.items():
        watch.own(category, tensors)
