"""Memory of a step by phase and by category, on GPU and CPU, as metrics.

The gated peaks come from the allocator's counters in an undisturbed pass; the categories from a second, recorded pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from hpc_core.measure.clock import quiet, synchronize
from hpc_core.measure.history import AllocatorHistory
from hpc_core.measure.owners import optimizer_tensors, weight_tensors
from hpc_core.measure.phases import peaks_of
from hpc_core.measure.storages import StorageWatch
from hpc_core.measure.timeline import CATEGORIES, Timeline
from hpc_core.perform.metrics import measured_bytes
from hpc_core.perform.session import Session
from hpc_core.program import Mark, Program

__all__ = ["Watch", "measure_memory"]


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
) -> None:
    """Measure peaks by phase over `steps` steps and categories over one, into the session's metrics.

    The program runs on from where it stands: the caller puts it before its largest step. `marking` may wrap the
    recorder, to name owners that only live for a while (gradients, KV cache).
    """
    session.phase("memory")
    owners = weight_tensors(model) if model is not None else {}
    if optimizer is not None:
        owners["optimizer"] = optimizer_tensors(optimizer)
    if session.on_gpu:
        with quiet():
            peaks = peaks_of(program, session.device, steps)
        synchronize(session.device)
        timeline = _from_history(session, program, owners, marking)
    else:
        timeline = _from_storages(program, owners, marking)
        peaks = timeline.peaks_by_phase(program.phases)
    peak = max(peaks.values())
    session.metrics["peak_bytes"] = measured_bytes(peak, machine=session.on_gpu)
    if len(program.phases) > 1:
        for phase, value in peaks.items():
            session.metrics[f"peak_{phase}_bytes"] = measured_bytes(value, machine=session.on_gpu)
    _categories(session, timeline)


def _categories(session: Session, timeline: Timeline) -> None:
    totals = dict(timeline.at_peak())
    for category in CATEGORIES:
        if totals[category]:
            # At the step's highest point, by requested bytes; the allocator rounds up to its blocks beyond that.
            session.metrics[f"at_peak_{category}_bytes"] = measured_bytes(totals[category], machine=session.on_gpu)
    if session.on_gpu:
        rounding = int(session.metrics["peak_bytes"].value) - sum(totals.values())
        session.metrics["at_peak_rounding_bytes"] = measured_bytes(max(rounding, 0), machine=True, gated=False)


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


def _from_storages(program: Program, owners: dict[str, list[torch.Tensor]], marking: Any) -> Timeline:
    watch = StorageWatch(program.phases)
    mark: Mark = watch if marking is None else marking(_TensorWatch(watch))
    for category, tensors in owners.items():
        watch.own(category, tensors)
    with quiet(), watch:
        program.step(mark)
    return watch.timeline
