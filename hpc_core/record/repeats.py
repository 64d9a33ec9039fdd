"""Several processes of one case as one record: busy times become samples, counts must agree, all else is the first process's.

Pure: records in, a record out. Launches nothing and judges nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.record.gpu_state import flags
from hpc_core.record.record import Metric, Process, Record


def merged(first: Record, more: Sequence[Record]) -> Record:
    """The record of a case whose full process gave `first` and whose further processes gave `more`.

    * A busy metric has one sample a process; its value is their median. Without further processes nothing changes.
    * A gated count or size must be equal in every process that measured it. If not, the record is invalid, with both numbers.
    * Peaks, wall samples, audit, losses and answers are the first's. The medians of each process's wall times are in `processes`.
    * A further process that failed or is invalid costs its sample, not the case; a note says so.

    `first` may be a merged record itself: more processes are added to it. One that failed or is invalid stays as it is.

    Raises:
        SpecError: they are records of different cases.
    """
    strange = next((record.case.id for record in more if record.case.digest != first.case.digest), None)
    if strange is not None:
        raise SpecError(f"{strange} is no further process of {first.case.id}: they differ in what runs.")
    if not more or first.status != "ok":
        return first
    before = first.processes or (_process(first),)
    sound = [record for record in more if record.status == "ok"]
    numbers = range(len(before) + 1, len(before) + len(more) + 1)
    numbered = dict(zip(numbers, more, strict=True))
    reasons = [reason for number, record in numbered.items() for reason in _contradictions(first, record, number)]
    processes = (*before, *map(_process, more))
    metrics = {name: _with_samples(name, metric, sound) for name, metric in first.metrics.items()}
    said = first.circumstances.notes
    notes = [*said, *(note for number, record in numbered.items() for note in _notes(number, record, said))]
    return msgspec.structs.replace(
        first,
        status="invalid" if reasons else "ok",
        reasons=tuple(reasons),
        metrics=metrics,
        processes=processes,
        circumstances=msgspec.structs.replace(first.circumstances, notes=tuple(dict.fromkeys(notes))),
    )


def busy_values(record: Record) -> dict[str, tuple[float, ...]]:
    """The samples of each busy metric, one a process."""
    return {name: _samples(metric) for name, metric in record.metrics.items() if metric.noise == "busy"}


def _samples(metric: Metric) -> tuple[float, ...]:
    return (float(metric.value),) if metric.samples is None else metric.samples


def _with_samples(name: str, metric: Metric, more: Sequence[Record]) -> Metric:
    found = [record.metrics[name] for record in more if name in record.metrics]
    if metric.noise != "busy" or not found:
        return metric
    samples = (*_samples(metric), *(float(each.value) for each in found))
    return msgspec.structs.replace(metric, value=statistics.median(samples), samples=samples)


def _contradictions(first: Record, record: Record, number: int) -> list[str]:
    """Counts and sizes that must be equal in every process, and are not."""
    if record.status != "ok":
        return []
    return [
        f"{name} is {metric.value:,} in process 1 and {other.value:,} in process {number} of the same case"
        f"{_per(metric.unit)}: what is counted must be equal in every process. Find what differs between them (hpc-core run), "
        "or take out of the step what runs in some steps only."
        for name, metric in first.metrics.items()
        if _is_exact(metric) and _is_exact(other := record.metrics.get(name, metric)) and metric.value != other.value
    ]


def _is_exact(metric: Metric) -> bool:
    return metric.noise == "exact" and metric.gated


def _per(unit: str) -> str:
    return f" ({unit.removeprefix('1 ')})" if " per " in unit else ""


def _process(record: Record) -> Process:
    seen, failure = record.circumstances, record.failure
    trouble = "" if failure is None else f"{failure.kind} in {failure.phase}: {failure.message}"
    return Process(
        started_at=seen.started_at,
        seconds=round(sum(seen.phase_s.values()), 3),
        wall_s=_medians(record.metrics),
        gpu=seen.gpu,
        flags=flags(seen.gpu),
        failure=trouble or " ".join(record.reasons),
    )


def _medians(metrics: Mapping[str, Metric]) -> dict[str, float]:
    return {
        name: statistics.median(metric.samples)
        for name, metric in metrics.items()
        if metric.noise == "wall" and metric.samples is not None
    }


def _notes(number: int, record: Record, said: Sequence[str]) -> list[str]:
    who = f"process {number} of {record.case.id}"
    if record.status != "ok":
        return [f"{who} gave no sample: {_process(record).failure}"]
    return [f"{who}: {note}" for note in record.circumstances.notes if note not in said]
