"""Make a record the baseline of its case, and keep the record in the history next to it.

Refuses what must never become a baseline. All files are replaced or none, and one process at a time does it.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from hpc_core.baselines.baseline import (
    Acceptance,
    Accepted,
    Baseline,
    Change,
    Missing,
    gated_metrics,
    proves_nothing,
)
from hpc_core.baselines.history import history_lines, lengthened
from hpc_core.baselines.lookup import (
    baseline_path,
    find,
    history_path,
    render,
)
from hpc_core.baselines.profiles import profile_bytes, profile_path
from hpc_core.baselines.transaction import locked, replace_together
from hpc_core.case.case import SCHEMA
from hpc_core.case.errors import BaselineError, SpecError
from hpc_core.record.metrics import is_disturbed
from hpc_core.record.plain import plain
from hpc_core.record.record import Metric, Record, record_from_json, record_to_json


def accept(
    root: Path, record: Record, *, reason: str, allow_dirty: bool = False, at: datetime.datetime | None = None
) -> Acceptance:
    """Make this record the baseline of its case on its machine, and add it to the history.

    The baseline is rewritten only if metrics, limits, stack, settings, digest or machine differ. The history grows by one line, within the bounds
    of `history`, and the profile becomes that of this record. A record of uncommitted code, or of code without a commit, is
    refused unless `allow_dirty`; a record that names its commit and does not know of changes (HPC_CORE_COMMIT) is not.

    Raises:
        BaselineError: the record must not become a baseline, the history is damaged, or the files cannot be written.
    """
    refuse(record, reason, allow_dirty)
    record = _as_read(record)
    key, case = record.circumstances.machine.key, record.case.id
    path = baseline_path(root, key, case)
    new = _baseline(record, plain(reason.strip()), at or datetime.datetime.now(datetime.UTC))
    with locked(path.parent):
        found = find(root, key, case)
        old = found if isinstance(found, Baseline) else None
        changed = old is None or _substance(old) != _substance(new)
        history = history_path(root, key, case)
        # The history is read for every judgement; the profile is only for explanations, so it has its own file.
        newest = record_to_json(msgspec.structs.replace(record, profile=None))
        lines = lengthened(history_lines(history), newest, case)
        # An earlier record's profile does not explain this baseline.
        contents = {profile_path(root, key, case): profile_bytes(record)}
        contents |= {path: render(new)} if changed else {}
        replace_together(contents | {history: b"".join(line + b"\n" for line in lines)})
    action: Literal["created", "updated", "unchanged"] = "updated" if changed else "unchanged"
    if isinstance(found, Missing):
        action = "created"
    return Acceptance(
        path=str(path),
        action=action,
        changes=changes_between({} if old is None else old.metrics, new.metrics),
        left_out=tuple(
            f"{name} ({metric.note})" for name, metric in sorted(record.metrics.items()) if is_disturbed(metric)
        ),
    )


def _as_read(record: Record) -> Record:
    """Return the record as it will be read: its texts are plain, and none of its numbers is lost.

    Raises:
        BaselineError: it could not be read.
    """
    try:
        return record_from_json(record_to_json(record))
    except SpecError as error:
        raise BaselineError(f"{record.case.id}: the record could not be read again: {error}") from error


def unstored(record: Record, *, reason: str) -> Baseline:
    """Return the baseline that this record would become, for a judgement in the same session; nothing is written.

    Raises:
        BaselineError: the record must not become a baseline.
    """
    refuse(record, reason, allow_dirty=True)
    return _baseline(record, reason, datetime.datetime.now(datetime.UTC))


def refuse(record: Record, reason: str, allow_dirty: bool) -> None:
    """Refuse what must not become a baseline.

    Raises:
        BaselineError: the record is not sound, has no reason, or is of uncommitted or unknown code without `allow_dirty`.
    """
    case, circumstances = record.case.id, record.circumstances
    if not reason.strip():
        raise BaselineError(f'{case}: a baseline needs a reason, such as --reason "checkpointing is off on purpose".')
    if record.status != "ok":
        why = record.failure.message if record.failure is not None else " ".join(record.reasons)
        raise BaselineError(f"{case}: the record is {record.status}, so it cannot be a baseline: {why}")
    if circumstances.fault is not None:
        raise BaselineError(
            f"{case}: fault {circumstances.fault!r} was injected; run without --perf-fault, and accept that record."
        )
    without_commit = None if allow_dirty else why_without_commit(circumstances.commit, circumstances.dirty)
    if without_commit is not None:
        raise BaselineError(f"{case}: {without_commit}")
    gated = gated_metrics(record)
    if not gated:
        raise BaselineError(
            f"{case}: none of {len(record.metrics)} metrics is gated, so a baseline would hold nothing."
        )
    void = [text for name, metric in gated.items() if (text := proves_nothing(name, metric)) is not None]
    void += [
        f"a sample of {name} is not above 0"
        for name, metric in gated.items()
        if metric.noise == "busy" and min(metric.samples or (metric.value,)) <= 0 < metric.value
    ]
    if void:
        raise BaselineError(f"{case}: {'; '.join(void)}. Measure again before accepting.")


def why_without_commit(commit: str | None, dirty: bool | None) -> str | None:
    """Return why no commit holds the code that runs, and what to do; None if one does."""
    allow = "allow it: --perf-allow-dirty with --perf-update, --allow-dirty with hpc-core baseline accept."
    if commit is None:
        return (
            "nobody can tell which code gives these numbers: it runs outside a git repository, or in one without a commit. "
            f"Commit the code and run again; or name the commit of a copied tree with HPC_CORE_COMMIT; or {allow}"
        )
    if dirty:
        return (
            f"the tree has uncommitted changes on {commit[:10]}, so nobody could measure this again. "
            f"Commit them and run again, or {allow}"
        )
    return None


def _baseline(record: Record, reason: str, at: datetime.datetime) -> Baseline:
    circumstances = record.circumstances
    return Baseline(
        schema=SCHEMA,
        case=record.case.id,
        digest=record.case.digest,
        spec=record.case,
        machine=circumstances.machine,
        stack=circumstances.stack,
        settings=circumstances.settings,
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
    # The key, not the whole machine: any CPU is "cpu", and another CPU's name must not rewrite every file.
    around = (baseline.machine.key, baseline.stack, baseline.settings)
    return baseline.digest, baseline.spec.limits, around, baseline.metrics


def changes_between(old: Mapping[str, Metric], new: Mapping[str, Metric]) -> tuple[Change, ...]:
    """Return the metrics that differ in anything, by name, with the value before and after."""
    changes = []
    for name in sorted({*old, *new}):
        was, now = old.get(name), new.get(name)
        if was != now:
            unit = now.unit if now is not None else old[name].unit
            old_value, new_value = (None if metric is None else metric.value for metric in (was, now))
            changes.append(Change(metric=name, old=old_value, new=new_value, unit=unit))
    return tuple(changes)
