"""Records for the tests of reports: the H100's committed ones, copied under other ids, changed or failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import msgspec

from hpc_core.baselines.reading import read_records
from hpc_core.record.record import Failure, Metric, Record, record_to_json
from hpc_core.report.entry import Entry
from hpc_core.report.pictures import pictures

H100 = Path(__file__).parents[2] / "baselines" / "nvidia-h100-80gb-hbm3-80gib"


@cache
def measured() -> tuple[Record, ...]:
    """All committed records of the H100."""
    return read_records([H100]).records


def many(count: int) -> list[Record]:
    """`count` different cases, each a copy of a measured one."""
    source = measured()
    copies = []
    for number in range(count):
        record = source[number % len(source)]
        case = msgspec.structs.replace(record.case, id=f"{record.case.id}-{number:03}")
        copies.append(msgspec.structs.replace(record, case=case))
    return copies


def with_metric(record: Record, name: str, factor: float) -> Record:
    """The record with one metric multiplied by `factor`."""
    metric = record.metrics[name]
    value = int(metric.value * factor) if isinstance(metric.value, int) else metric.value * factor
    changed: dict[str, Metric] = {name: msgspec.structs.replace(metric, value=value)}
    return msgspec.structs.replace(record, metrics=record.metrics | changed)


def failed(record: Record, message: str) -> Record:
    """The record of the case had it run out of memory."""
    failure = Failure(kind="out_of_memory", phase="build", message=message)
    return msgspec.structs.replace(record, status="failed", failure=failure, metrics={})


def written(folder: Path, records: Iterable[Record]) -> Path:
    """The folder with one file per record, as `--perf-records` writes it."""
    for number, record in enumerate(records):
        path = folder / f"{record.case.id}-{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(record_to_json(record, indent=2))
    return folder


def draw_all(entries: Sequence[Entry], folder: Path, kinds: Sequence[str]) -> list[Path]:
    """Draw what the command draws, and return the files in the order of the pictures."""
    drawn = pictures(entries, folder, kinds)
    for path, content in drawn.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return list(drawn)
