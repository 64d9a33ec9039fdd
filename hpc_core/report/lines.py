"""Sentences about baselines: what was accepted, what changed since the merge base, what to accept next, and waivers."""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from hpc_core.baselines.at_commit import BaselineChange
from hpc_core.baselines.baseline import Acceptance, Baseline, Change, Damaged, Lookup, Missing
from hpc_core.gate.comparability import moved as differences
from hpc_core.gate.verdict import Judgement, MetricVerdict, Verdict
from hpc_core.gate.waivers import Waiver
from hpc_core.record import units
from hpc_core.record.settings import is_setting
from hpc_core.report.command import accept_together
from hpc_core.report.entry import Row, first_change, moved

_SHOWN = 6


def accepted_line(acceptance: Acceptance) -> str:
    """Return what an acceptance wrote: "updated baselines/cpu/tiny/lora.json: peak_bytes 5.40 MiB → 5.60 MiB (and 3 more)".

    It ends with the times that were disturbed, and so are not judged until they are accepted.
    """
    left_out = ", ".join(acceptance.left_out)
    rest = f"; not accepted: {left_out}. Run again on a quiet machine to have it judged" if left_out else ""
    return f"{_written(acceptance)}{rest}"


def _written(acceptance: Acceptance) -> str:
    path = Path(acceptance.path)
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    if acceptance.action == "unchanged":
        return f"unchanged {path}: every gated metric as accepted"
    if acceptance.action == "updated" and not acceptance.changes:
        return f"updated {path}: every gated metric as accepted, with the limits, stack and settings of this run"
    changed = [change for change in acceptance.changes if change.old is not None]
    if acceptance.action == "created" or not changed:
        leading = first_change(acceptance.changes)
        return f"{acceptance.action} {path}: {len(acceptance.changes)} metrics, {leading}"
    return f"{acceptance.action} {path}: {'; '.join(moved(change) for change in acceptance.changes)}"


def change_line(change: BaselineChange) -> str:
    """Return such as "cpu/tiny/lora: peak_bytes 5.62 GiB → 7.50 GiB (+33 %); reason: checkpointing is off on purpose"."""
    where = f"{change.machine}/{change.case}"
    if isinstance(change.new, Missing):
        return f"{where}: REMOVED"
    if not isinstance(change.new, Baseline):
        return f"{where}: {_state(change.new)}"
    accepted = change.new.accepted
    code = " (uncommitted code)" if accepted.dirty else " (unknown code)" if accepted.commit is None else ""
    reason = f"; reason: {accepted.reason}{code}"
    if not isinstance(change.old, Baseline):
        before = "new" if isinstance(change.old, Missing) else f"was {_state(change.old)}, now sound"
        return f"{where}: {before}, {len(change.new.metrics)} metrics{reason}"
    case = "the case changed; " if change.old.digest != change.new.digest else ""
    metrics = change.metrics
    limits = _limits_changed(change.old, change.new)
    shown = ", ".join(changed_metric(each) for each in metrics[:_SHOWN]) or "every value as before"
    more = f" and {len(metrics) - _SHOWN} more" if len(metrics) > _SHOWN else ""
    return f"{where}: {case}{shown}{more}{limits}{reason}"


def _limits_changed(old: Baseline, new: Baseline) -> str:
    was, now = ({name: str(limit) for name, limit in each.spec.limits.named().items()} for each in (old, new))
    texts = differences(was, now, "none").values()
    return f"; limits: {', '.join(texts)}" if texts else ""


def _state(lookup: Lookup) -> str:
    return f"DAMAGED: {lookup.reason}" if isinstance(lookup, Damaged) else "of another schema"


def changed_metric(change: Change) -> str:
    """Return such as "peak_bytes 5.62 GiB → 7.50 GiB (+33 %)"."""
    if change.old is None or change.new is None:
        value = change.old if change.new is None else change.new
        assert value is not None
        return f"{change.metric} {units.quantity(value, change.unit)} {'dropped' if change.new is None else 'added'}"
    if change.old == change.new:
        return f"{change.metric} {units.quantity(change.new, change.unit)} (what is known of it changed)"
    ratio = f" ({units.percent(change.new / change.old - 1)})" if change.old else ""
    return f"{change.metric} {units.pair(change.old, change.new, change.unit)}{ratio}"


def settings_lines(judgements: Iterable[Judgement | None]) -> tuple[str, ...]:
    """Return a line for each setting that differs from the baselines', whatever the verdict: numbers are then compared across it."""
    differing = Counter(
        text for each in judgements if each is not None for text in each.moved if is_setting(text.partition(" ")[0])
    )
    return tuple(
        f"set otherwise than in the baseline of {units.counted(count, 'case')}: {text}"
        for text, count in differing.items()
    )


def keep_gains(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return a sentence and the commands that accept every case that improved; nothing where none did.

    A case where something else got worse is left out: accepting it would accept both.
    """
    better = [
        row
        for row in rows
        if row.judgement is not None and row.judgement.verdict is Verdict.IMPROVED and row.commands.accept
    ]
    if not better:
        return ()
    many = f"{len(better)} cases are" if len(better) > 1 else f"{better[0].case} is"
    return f"{many} better than accepted. Keep the gain, so that it cannot be lost unnoticed:", *_commands(better)


def accept_new(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return a sentence and the commands that accept the new metrics of cases that passed; nothing where there are none."""
    found: dict[str, Row] = {}
    names: dict[str, None] = {}
    for row in rows:
        if row.judgement is None or row.judgement.verdict is not Verdict.PASS or row.acceptance is not None:
            continue
        if not row.commands.accept:
            continue
        new = [each.metric for each in row.judgement.metrics if _is_new(each)]
        if new:
            found[row.case] = row
            names |= dict.fromkeys(new)
    if not found:
        return ()
    who = f"{len(found)} cases" if len(found) > 1 else next(iter(found))
    sentence = f"New, not judged in {who}: {', '.join(names)}. The baseline does not hold it yet. To have it judged:"
    return sentence, *_commands(found.values())


def _is_new(row: MetricVerdict) -> bool:
    return not row.judged and row.verdict is not Verdict.INCONCLUSIVE


def time_notes(rows: Iterable[Row]) -> tuple[str, ...]:
    """Return a sentence for each time that was disturbed too much to be judged, and for each that passes although it looks worse."""
    judged = [(row.case, each) for row in rows if row.judgement is not None for each in row.judgement.metrics]
    found = []
    for case, each in judged:
        if not each.judged and each.verdict is Verdict.INCONCLUSIVE:
            found.append(f"{case}: {each.reason} {each.next_step}")
        elif each.remark:
            found.append(f"{case}: {each.remark}")
    return tuple(found)


def _commands(rows: Iterable[Row]) -> list[str]:
    return [f"    {command}" for command in accept_together(row.commands for row in rows)]


def waiver_line(
    waiver: Waiver,
    rows: Sequence[Row],
    known: Collection[str] | None,
    today: datetime.date,
    *,
    is_merged: bool = True,
) -> str:
    """Return a waiver in one line: metric, limit, owner, expiry, reason, and whether this run needed it.

    `known` holds the ids of all cases of the suite and of all baselines, or None if only a part was collected: then a waiver that
    matches no case that ran may still match another. `is_merged` is False for a waiver that a pull request brings or loosens.
    """
    mine = [row for row in rows if waiver.covers(row.case)]
    known_units = [row.record.metrics[waiver.metric].unit for row in mine if waiver.metric in row.record.metrics]
    limit = waiver.limit_text(next(iter(known_units), ""))
    days = (waiver.expires - today).days
    when = (
        f"EXPIRED {units.counted(-days, 'day')} ago: remove it or renew it"
        if days < 0
        else f"{units.counted(days, 'day')} left"
    )
    state = _waiver_state(waiver, mine, known)
    state = state if is_merged or state.startswith("WARNING") else "counts from the merge on"
    return (
        f"{waiver.metric} of {waiver.case} up to {limit}, by {waiver.owner} until {waiver.expires} ({when}): "
        f"{waiver.reason} [{state}]"
    )


def _waiver_state(waiver: Waiver, mine: Sequence[Row], known: Collection[str] | None) -> str:
    if not mine:
        if known is not None and not any(map(waiver.covers, known)):
            return f"WARNING: matches none of {len(known)} cases of the suite and of the baselines"
        return "no case of it ran"
    sound = [row for row in mine if row.record.status == "ok"]
    if sound and not any(waiver.metric in row.record.metrics for row in sound):
        return f"WARNING: {_cases(sound)} without such a metric"
    judged = [row for row in sound if row.judgement is not None]
    needed = [row for row in judged if _is_needed(waiver, row)]
    used = [row for row in needed if _is_used(waiver, row)]
    if len(used) < len(needed):
        return f"not enough for {_cases([row for row in needed if row not in used])}"
    return f"used by {_cases(used)}" if used else "not needed in this run"


def _is_needed(waiver: Waiver, row: Row) -> bool:
    assert row.judgement is not None
    return any(each.metric == waiver.metric and each.verdict is Verdict.REGRESSED for each in row.judgement.metrics)


def _is_used(waiver: Waiver, row: Row) -> bool:
    assert row.judgement is not None
    return any(excuse.metric == waiver.metric for excuse in row.judgement.excuses)


def _cases(rows: Sequence[Row]) -> str:
    return rows[0].case if len(rows) == 1 else f"{len(rows)} cases"
