"""Make a record the baseline of its case, and keep the record beside it as the proof.

Knows which records must never become a baseline, and how both files are replaced whole or not at all. Judges nothing.
"""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpc_core.errors import BaselineError, SpecError
from hpc_core.record import Metric, Record, record_from_json, record_to_json
from hpc_core.spec import SCHEMA
from hpc_core.store.baseline import Acceptance, Accepted, Baseline, Change, Missing, gated_metrics, proves_nothing
from hpc_core.store.lookup import baseline_path, find, history_path, render

__all__ = ["HISTORY_LENGTH", "accept", "last_accepted", "unstored"]

HISTORY_LENGTH = 8
"""Accepted sessions kept beside a baseline."""


def accept(
    root: Path, record: Record, *, reason: str, allow_dirty: bool = True, at: datetime.datetime | None = None
) -> Acceptance:
    """Make this record the baseline of its case on its machine, and add it to the history beside it.

    The baseline is rewritten only if metrics, stack, digest or machine differ; the history always grows by one line,
    to `HISTORY_LENGTH` at most. Both files are replaced whole or not at all.

    Raises:
        BaselineError: the record must not be a baseline, the history is damaged, or the files cannot be written.
    """
    circumstances = record.circumstances
    path = baseline_path(root, circumstances.machine.key, record.case.id)
    _refuse(record, reason, allow_dirty)
    new = _baseline(record, reason.strip(), at or datetime.datetime.now(datetime.UTC))
    history = history_path(root, circumstances.machine.key, record.case.id)
    kept = _history_lines(history)
    found = find(root, circumstances.machine.key, record.case.id)
    old = found if isinstance(found, Baseline) else None
    try:
        lines = [*kept, record_to_json(record)][-HISTORY_LENGTH:]
        texts = {history: b"".join(line + b"\n" for line in lines)}
        if old is None or _substance(old) != _substance(new):
            texts[path] = render(new)
    except UnicodeEncodeError as error:
        raise BaselineError(f"{record.case.id}: the record or the reason is no valid text: {error}.") from error
    _replace_all(texts)
    action: Literal["created", "updated", "unchanged"] = "updated" if path in texts else "unchanged"
    if isinstance(found, Missing):
        action = "created"
    return Acceptance(path=str(path), action=action, changes=_changes(old, new))


def unstored(record: Record, *, reason: str) -> Baseline:
    """The baseline that this record would become, for a judgement in the same session; nothing is written.

    Raises:
        BaselineError: the record must not be a baseline.
    """
    _refuse(record, reason, allow_dirty=True)
    return _baseline(record, reason, datetime.datetime.now(datetime.UTC))


def _refuse(record: Record, reason: str, allow_dirty: bool) -> None:
    case, circumstances = record.case.id, record.circumstances
    if not reason.strip():
        raise BaselineError(f'{case}: a baseline needs a reason, such as --reason "checkpointing is off on purpose".')
    if record.status != "ok":
        why = record.failure.message if record.failure is not None else " ".join(record.reasons)
        raise BaselineError(f"{case}: the record is {record.status}, so it is no baseline: {why}")
    if circumstances.fault is not None:
        raise BaselineError(
            f"{case}: fault {circumstances.fault!r} was injected; run without --perf-fault and accept that."
        )
    if circumstances.dirty and not allow_dirty:
        raise BaselineError(
            f"{case}: the tree has uncommitted changes on {circumstances.commit}; commit them and run again."
        )
    gated = gated_metrics(record)
    if not gated:
        raise BaselineError(
            f"{case}: none of {len(record.metrics)} metrics is gated, so a baseline would hold nothing."
        )
    void = [text for name, metric in gated.items() if (text := proves_nothing(name, metric)) is not None]
    if void:
        raise BaselineError(f"{case}: {'; '.join(void)}. Measure again before accepting.")


def _baseline(record: Record, reason: str, at: datetime.datetime) -> Baseline:
    circumstances = record.circumstances
    return Baseline(
        schema=SCHEMA,
        case=record.case.id,
        digest=record.case.digest,
        spec=record.case,
        machine=circumstances.machine,
        stack=circumstances.stack,
        python=circumstances.python,
        accepted=Accepted(
            reason=reason,
            at=at.astimezone(datetime.UTC).isoformat(timespec="seconds"),
            commit=circumstances.commit,
            dirty=circumstances.dirty,
        ),
        metrics=gated_metrics(record),
    )


def _substance(baseline: Baseline) -> tuple[Any, ...]:
    # The key, not the whole machine: any CPU is "cpu", and its name must not rewrite every file.
    return baseline.digest, baseline.machine.key, baseline.stack, baseline.metrics


def _changes(old: Baseline | None, new: Baseline) -> tuple[Change, ...]:
    before: dict[str, Metric] = {} if old is None else old.metrics
    changes = []
    for name in sorted(before | new.metrics):
        was, now = before.get(name), new.metrics.get(name)
        if was != now:
            unit = now.unit if now is not None else before[name].unit
            old_value, new_value = (None if metric is None else metric.value for metric in (was, now))
            changes.append(Change(metric=name, old=old_value, new=new_value, unit=unit))
    return tuple(changes)


def last_accepted(root: Path, key: str, case_id: str) -> Record | None:
    """The record that was accepted last; None where there is none or it cannot be read: for an explanation, never for a verdict.

    Raises:
        BaselineError: as `baseline_path`.
    """
    try:
        lines = _history_lines(history_path(root, key, case_id))
    except BaselineError:
        return None
    try:
        return record_from_json(lines[-1]) if lines else None
    except SpecError:
        return None


def _history_lines(path: Path) -> list[bytes]:
    """The lines of an intact history. A line of another schema is kept as it is: it was proof when it was written."""
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as error:
        raise BaselineError(
            f"{path}: the history cannot be read ({error}). Move it away, then accept again."
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            schema = msgspec.json.decode(line, type=_SchemaOnly).schema
            if schema == SCHEMA:
                record_from_json(line)
        except (SpecError, msgspec.MsgspecError, ValueError, RecursionError) as error:
            message = (
                f"{path}, line {number}: not a record ({error}). Restore it from git or delete it, then accept again."
            )
            raise BaselineError(message) from error
    return lines


class _SchemaOnly(msgspec.Struct):
    schema: int = SCHEMA


def _replace_all(texts: dict[Path, bytes]) -> None:
    """Write and flush every text beside its file before any is put in place, so that a full disk changes nothing."""
    try:
        with _drafts(texts) as drafts:
            for path, draft in drafts.items():
                draft.replace(path)
    except OSError as error:
        raise BaselineError(
            f"{', '.join(map(str, texts))}: cannot be written: {error}. Nothing old was lost."
        ) from error


@contextmanager
def _drafts(texts: dict[Path, bytes]) -> Iterator[dict[Path, Path]]:
    drafts = {path: path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp") for path in texts}
    try:
        for path, draft in drafts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("xb") as file:
                file.write(texts[path])
                file.flush()
                os.fsync(file.fileno())
        yield drafts
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)
