"""Merge the records of several processes of one case: busy times become samples, counts must agree, the rest is the first process's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.record.gpu_state import flags
from hpc_core.record.metrics import canaries_of, is_disturbed
from hpc_core.record.record import Metric, Process, Record


def merged(first: Record, more: Sequence[Record]) -> Record:
    """Return the record of a case whose full process gave `first` and whose further processes gave `more`.

    * A busy metric, and the clock meanwhile, gets one sample per process; its value is their median. Without further processes
      nothing changes.
    * A wall time that was disturbed in the first process is that of the first one in which it was not.
    * A gated count or size must be equal in every process that measured it. If not, the record is invalid, with both numbers.
    * Peaks, wall samples, audit, losses and answers are those of the first process. `processes` contains the median wall times of each.
    * A further process that failed or is invalid gives no sample, and a note says why. The case is not affected.

    `first` may itself be a merged record: more processes are added to it. If it failed or is invalid, it is returned unchanged.

    Raises:
        SpecError: the records are of different cases.
    """
    other = next((record.case.id for record in more if record.case.digest != first.case.digest), None)
    if other is not None:
        raise SpecError(f"{other} cannot be merged into {first.case.id}: the cases run different work.")
    if not more or first.status != "ok":
        return first
    before = first.processes or (_process(first),)
    sound = [record for record in more if record.status == "ok"]
    numbers = range(len(before) + 1, len(before) + len(more) + 1)
    numbered = dict(zip(numbers, more, strict=True))
    reasons = [reason for number, record in numbered.items() for reason in _contradictions(first, record, number)]
    processes = (*before, *map(_process, more))
    metrics = {name: _with_samples(name, metric, sound) for name, metric in first.metrics.items()}
    shared = first.circumstances.notes
    notes = [*shared, *(note for number, record in numbered.items() for note in _notes(number, record, shared))]
    return msgspec.structs.replace(
        first,
        status="invalid" if reasons else "ok",
        reasons=tuple(reasons),
        metrics=metrics,
        processes=processes,
        circumstances=msgspec.structs.replace(first.circumstances, notes=tuple(dict.fromkeys(notes))),
    )


def busy_values(record: Record) -> dict[str, tuple[float, ...]]:
    """Return the samples of each busy time, one per process."""
    return {
        name: _samples(metric)
        for name, metric in record.metrics.items()
        if metric.noise == "busy" and metric.unit == "s"
    }


def values_of_processes(record: Record) -> dict[str, tuple[float, ...]]:
    """Return one value per process of each metric: samples of busy time, medians of wall time, else the one value."""
    wall = {
        name: [process.wall_s[name] for process in record.processes if name in process.wall_s]
        for name in record.metrics
    }
    return {
        name: _samples(metric) if metric.noise == "busy" else tuple(wall[name]) or (float(metric.value),)
        for name, metric in record.metrics.items()
    }


def word_of(record: Record) -> Literal["process", "pass"]:
    """Return what the samples of a record are of: processes, or passes within one process."""
    return "pass" if record.circumstances.launched == "inline" else "process"


def disturbed(metrics: Mapping[str, Metric]) -> set[str]:
    """Return the wall times that would be judged if other programs had not kept every call waiting for a core."""
    return {name for name, metric in metrics.items() if is_disturbed(metric)}


def _samples(metric: Metric) -> tuple[float, ...]:
    return (float(metric.value),) if metric.samples is None else metric.samples


def _with_samples(name: str, metric: Metric, more: Sequence[Record]) -> Metric:
    found = [record.metrics[name] for record in more if name in record.metrics]
    if metric.noise == "wall":
        undisturbed = [each for each in found if each.gated]
        return metric if metric.gated or not undisturbed else undisturbed[0]
    if metric.noise != "busy" or not found:
        return metric
    samples = (*_samples(metric), *(float(each.value) for each in found))
    return msgspec.structs.replace(metric, value=statistics.median(samples), samples=samples)


def _contradictions(first: Record, record: Record, number: int) -> list[str]:
    """Return a reason for each count or size that differs from the first process."""
    if record.status != "ok":
        return []
    one = word_of(record)
    return [
        f"{name} is {metric.value:,} in {one} 1 and {other.value:,} in {one} {number} of the same case"
        f"{_per(metric.unit)}: counts must be equal in every {one}. Find what differs between them (hpc-core run), "
        "or remove from the step what does not run in every step."
        for name, metric in first.metrics.items()
        if _is_exact(metric) and _is_exact(other := record.metrics.get(name, metric)) and metric.value != other.value
    ]


def _is_exact(metric: Metric) -> bool:
    return metric.noise == "exact" and metric.gated


def _per(unit: str) -> str:
    return f" ({unit.removeprefix('1 ')})" if " per " in unit else ""


def _process(record: Record) -> Process:
    around, failure = record.circumstances, record.failure
    message = "" if failure is None else f"{failure.kind} in {failure.phase}: {failure.message}"
    return Process(
        started_at=around.started_at,
        seconds=round(sum(around.phase_s.values()), 3),
        wall_s=_medians(record.metrics),
        gpu=around.gpu,
        flags=flags(around.gpu),
        failure=message or " ".join(record.reasons),
    )


def _medians(metrics: Mapping[str, Metric]) -> dict[str, float]:
    out = disturbed(metrics)
    out |= {canaries_of(name) for name in out}
    return {
        name: float(metric.value)
        for name, metric in metrics.items()
        if metric.noise == "wall" and metric.samples is not None and name not in out
    }


def _notes(number: int, record: Record, shared: Sequence[str]) -> list[str]:
    process = f"{word_of(record)} {number} of {record.case.id}"
    if record.status != "ok":
        return [f"{process} gave no sample: {_process(record).failure}"]
    return [f"{process}: {note}" for note in record.circumstances.notes if note not in shared]
