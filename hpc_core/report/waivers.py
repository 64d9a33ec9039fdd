"""A waiver in one line of the report: of what, up to what, whose, until when, and whether this run needed it."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from hpc_core.gate.verdict import Verdict
from hpc_core.gate.waivers import Waiver
from hpc_core.report.row import Row

__all__ = ["waiver_line"]


def waiver_line(waiver: Waiver, rows: Sequence[Row], known: Sequence[str] | None, today: datetime.date) -> str:
    """The line of a waiver, whatever became of it in this run.

    `known` are the ids of all cases of the suite, or None where that is not known: then a waiver that matches none of the
    cases that ran may well match another.
    """
    mine = [row for row in rows if waiver.covers(row.case)]
    units = [row.record.metrics[waiver.metric].unit for row in mine if waiver.metric in row.record.metrics]
    limit = waiver.limit_text(next(iter(units), ""))
    days = (waiver.expires - today).days
    when = f"EXPIRED {-days} days ago: remove it or renew it" if days < 0 else f"{days} days left"
    state = _state(waiver, mine, known)
    return (
        f"{waiver.metric} of {waiver.case} up to {limit}, by {waiver.owner} until {waiver.expires} ({when}): "
        f"{waiver.reason} [{state}]"
    )


def _state(waiver: Waiver, mine: Sequence[Row], known: Sequence[str] | None) -> str:
    if not mine:
        if known is not None and not any(map(waiver.covers, known)):
            return f"WARNING: matches none of the suite's {len(known)} cases"
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
