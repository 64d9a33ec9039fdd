"""The history of a baseline, `<case>.history.jsonl`: the accepted records, whole, one a line, oldest first.

It is bounded in number and in bytes. Statistics over machine starts are made of its sessions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_core.baselines.lookup import history_path
from hpc_core.baselines.transaction import recover
from hpc_core.case.case import SCHEMA
from hpc_core.case.errors import BaselineError, SpecError
from hpc_core.record.files import read_regular
from hpc_core.record.plain import plain
from hpc_core.record.record import Record, record_from_json, schema_of
from hpc_core.record.repeats import values_of_processes

HISTORY_LENGTH = 8
"""Accepted sessions that are kept: a prediction interval needs at least five, and machines drift over more."""
HISTORY_BYTES = 2**20
"""1 MiB for the whole file. A record takes 4 to 30 KB, so only one with a timeline or many answers comes near."""
_LARGEST_BYTES = 8 * HISTORY_BYTES
"""Of a file that is read: one that a merge has joined is still longer than one that was written here."""


def lengthened(lines: Sequence[bytes], newest: bytes, case_id: str) -> list[bytes]:
    """Return the lines of the history once this record is accepted: the newest ones that keep both bounds, each whole.

    Raises:
        BaselineError: the record alone is larger than a history may be.
    """
    if len(newest) + 1 > HISTORY_BYTES:
        raise BaselineError(
            f"{case_id}: the record takes {len(newest):,} bytes, a whole history at most {HISTORY_BYTES:,}. "
            "Accept one without a timeline, with fewer answers or losses."
        )
    kept, size = [newest], len(newest) + 1
    for line in reversed(lines[-(HISTORY_LENGTH - 1) :]):
        size += len(line) + 1
        if size > HISTORY_BYTES:
            break
        kept.insert(0, line)
    return kept


def history_lines(path: Path) -> list[bytes]:
    """Return the lines of an intact history. A line of another schema is kept as it is: it was valid when it was written.

    Raises:
        BaselineError: the file cannot be read, or a line is not a record.
    """
    try:
        recover(path.parent)
        lines = read_regular(path, _LARGEST_BYTES).splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise BaselineError(
            f"{path}: the history cannot be read: {error.strerror}. Move it away, then accept again."
        ) from error
    return checked_lines(lines, str(path))


def checked_lines(lines: list[bytes], path: str) -> list[bytes]:
    """Return these lines, if each is a record or was one in another schema; `path` names the file in errors.

    Raises:
        BaselineError: a line is not a record.
    """
    for number, line in enumerate(lines, start=1):
        try:
            if schema_of(line) == SCHEMA:
                record_of_line(line)
        except (SpecError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            message = f"{path}, line {number}: not a record ({plain(str(error), 300)}). Restore it from git or delete it, then accept again."
            raise BaselineError(message) from error
    return lines


@functools.lru_cache(maxsize=2 * HISTORY_LENGTH)
def record_of_line(line: bytes) -> Record:
    """Return the record of a line. A line that was just checked is not parsed again.

    Raises:
        SpecError: it is not a record, or of another schema.
    """
    return record_from_json(line)


def last_accepted(root: Path, key: str, case_id: str) -> Record | None:
    """Return the record that was accepted last, for an explanation; None where there is none or it cannot be read.

    Raises:
        BaselineError: as `baseline_path`.
    """
    try:
        lines = history_lines(history_path(root, key, case_id))
    except BaselineError:
        return None
    try:
        return record_of_line(lines[-1]) if lines else None
    except SpecError:
        return None


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a case on one machine start: its values by metric."""

    at: str
    """When the case's first process began: ISO 8601, UTC."""
    commit: str | None
    gpu_uuid: str | None
    """None on a CPU."""
    stack: dict[str, str]
    metrics: dict[str, tuple[float, ...]]
    """Busy and wall time: one value per process, in seconds. Any other metric: its value, in its unit."""
    canary: dict[str, tuple[float, ...]]
    """Busy seconds of the canary, work that no code changes, by "compute" and "memory"; {} if it was not run."""


def sessions(root: Path, key: str, case_id: str, *, digest: str | None = None) -> tuple[Session, ...]:
    """Return the accepted sessions of a case on a machine, oldest first; none without a history.

    Only sessions of one digest count: of `digest`, or else of the case that was accepted last. A session that was accepted twice
    counts once. Lines of another schema are left out.

    Raises:
        BaselineError: the history is damaged; or as `baseline_path`.
    """
    return sessions_of_lines(history_lines(history_path(root, key, case_id)), digest)


def sessions_of_lines(lines: Sequence[bytes], digest: str | None = None) -> tuple[Session, ...]:
    """Return the same as `sessions`, from the checked lines of a history."""
    records = _records(lines)
    if not records:
        return ()
    chosen = digest or records[-1].case.digest
    return tuple(session_of(record) for record in records if record.case.digest == chosen)


def accepted_records(root: Path, key: str, case_id: str) -> tuple[Record, ...]:
    """Return the accepted records of a case on a machine, oldest first, each once; of this schema, of any digest.

    Raises:
        BaselineError: the history is damaged; or as `baseline_path`.
    """
    return _records(history_lines(history_path(root, key, case_id)))


def _records(lines: Sequence[bytes]) -> tuple[Record, ...]:
    # Reversed, so that a line that is there twice counts at its last acceptance.
    once = list(dict.fromkeys(reversed(lines)))
    found = []
    for line in reversed(once):
        try:
            found.append(record_of_line(line))
        except SpecError:  # intact, so of another schema
            continue
    return tuple(found)


def session_of(record: Record) -> Session:
    """Return the session of a record."""
    run = record.circumstances
    uuids = [run.gpu.get("uuid"), *(state.get("uuid") for state in run.gpu.values() if isinstance(state, dict))]
    return Session(
        at=run.started_at,
        commit=run.commit,
        gpu_uuid=next((str(uuid) for uuid in uuids if uuid), None),
        stack=run.stack,
        metrics=values_of_processes(record),
        canary={name: (float(seconds),) for name, seconds in run.canary.items()},
    )
