"""The history beside a baseline: the accepted records, whole, one a line, oldest first; bounded in number and in bytes.

Knows the lines of one file. What they mean as sessions is said in `sessions`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import msgspec

from hpc_core.baselines.lookup import history_path
from hpc_core.case.case import SCHEMA
from hpc_core.case.errors import BaselineError, SpecError
from hpc_core.record.record import Record, record_from_json

__all__ = [
    "HISTORY_BYTES",
    "HISTORY_LENGTH",
    "checked_lines",
    "history_lines",
    "last_accepted",
    "lengthened",
    "record_of_line",
    "schema_of",
]

HISTORY_LENGTH = 8
"""Accepted sessions kept beside a baseline: a prediction interval wants at least five, and machines drift over more."""
HISTORY_BYTES = 2**20
"""1 MiB for the whole file. A record takes 4 to 30 KB, so that only what carries a timeline or many answers comes near."""


def lengthened(lines: Sequence[bytes], newest: bytes, case_id: str) -> list[bytes]:
    """The lines of the history once this record is accepted: the newest ones that keep both bounds, each whole.

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
    """The lines of an intact history. A line of another schema is kept as it is: it was proof when it was written.

    Raises:
        BaselineError: the file cannot be read, or a line is no record.
    """
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise BaselineError(
            f"{path}: the history cannot be read ({error}). Move it away, then accept again."
        ) from error
    return checked_lines(lines, str(path))


def checked_lines(lines: list[bytes], path: str) -> list[bytes]:
    """These lines, if each is a record or was one in another schema; `path` is what the file is called.

    Raises:
        BaselineError: a line is no record.
    """
    for number, line in enumerate(lines, start=1):
        try:
            if schema_of(line) == SCHEMA:
                record_of_line(line)
        except (SpecError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            message = (
                f"{path}, line {number}: not a record ({error}). Restore it from git or delete it, then accept again."
            )
            raise BaselineError(message) from error
    return lines


@functools.lru_cache(maxsize=2 * HISTORY_LENGTH)
def record_of_line(line: bytes) -> Record:
    """The record of a line; a line that was just checked is not parsed again.

    Raises:
        SpecError: it is none, or of another schema.
    """
    return record_from_json(line)


def schema_of(line: bytes) -> int:
    """The schema that a line states.

    Raises:
        msgspec.MsgspecError, ValueError, RecursionError: it is no JSON object.
    """
    return msgspec.json.decode(line, type=_SchemaOnly).schema


class _SchemaOnly(msgspec.Struct):
    schema: int = SCHEMA


def last_accepted(root: Path, key: str, case_id: str) -> Record | None:
    """The record that was accepted last; None where there is none or it cannot be read: for an explanation, never for a verdict.

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
