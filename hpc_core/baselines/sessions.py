"""The accepted sessions of a case: what statistics over machine starts are made of, read from `<case>.history.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_core.baselines.history_file import history_lines, record_of_line
from hpc_core.baselines.lookup import history_path
from hpc_core.case.errors import SpecError
from hpc_core.record.record import Metric, Record

__all__ = ["Session", "accepted_records", "session_of", "sessions", "sessions_of_lines"]


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One run of the suite on one machine start, for one case: what was seen, by metric."""

    at: str
    """When the case's first process began: ISO 8601, UTC."""
    commit: str | None
    gpu_uuid: str | None
    """None on a CPU."""
    stack: dict[str, str]
    metrics: dict[str, tuple[float, ...]]
    """Busy time: one value a process of this session, in seconds. Everything else: the one value, in the metric's unit."""
    canary: dict[str, tuple[float, ...]]
    """Busy seconds of work that no code changes, by "compute" and "memory"; {} if it was not run."""


def sessions(root: Path, key: str, case_id: str, *, digest: str | None = None) -> tuple[Session, ...]:
    """The accepted sessions of a case on a machine, oldest first; none without a history.

    Only those of one and the same case count: of `digest`, or else of the case that was accepted last. A session that was
    accepted twice counts once. Lines of another schema are left out.

    Raises:
        BaselineError: the history is damaged; or as `baseline_path`.
    """
    return sessions_of_lines(history_lines(history_path(root, key, case_id)), digest)


def sessions_of_lines(lines: Sequence[bytes], digest: str | None = None) -> tuple[Session, ...]:
    """As `sessions`, from the checked lines of a history, wherever they were read."""
    records = _records(lines)
    if not records:
        return ()
    chosen = digest or records[-1].case.digest
    return tuple(session_of(record) for record in records if record.case.digest == chosen)


def accepted_records(root: Path, key: str, case_id: str) -> tuple[Record, ...]:
    """The accepted records of a case on a machine, whole, oldest first, each once; of this schema, whatever their digest.

    Raises:
        BaselineError: the history is damaged; or as `baseline_path`.
    """
    return _records(history_lines(history_path(root, key, case_id)))


def _records(lines: Sequence[bytes]) -> tuple[Record, ...]:
    # A dict from the end keeps the last acceptance of a line that is there twice.
    once = list(dict.fromkeys(reversed(lines)))
    found = []
    for line in reversed(once):
        try:
            found.append(record_of_line(line))
        except SpecError:  # intact, so of another schema
            continue
    return tuple(found)


def session_of(record: Record) -> Session:
    """What a record says of its session."""
    seen = record.circumstances
    uuids = [seen.gpu.get("uuid"), *(state.get("uuid") for state in seen.gpu.values() if isinstance(state, dict))]
    return Session(
        at=seen.started_at,
        commit=seen.commit,
        gpu_uuid=next((str(uuid) for uuid in uuids if uuid), None),
        stack=seen.stack,
        metrics={name: _of_processes(metric) for name, metric in record.metrics.items()},
        canary={name: (float(seconds),) for name, seconds in seen.canary.items()},
    )


def _of_processes(metric: Metric) -> tuple[float, ...]:
    # The samples of what a host clock sees are rounds of one process: they are no replicates, and only their median counts.
    if metric.noise == "busy" and metric.samples:
        return metric.samples
    return (float(metric.value),)
