"""Waivers: a known regression that somebody owns, up to a limit and until a day.

A waiver changes what a REGRESSED metric does to its test, never the verdict: the report still calls it REGRESSED.
"""

from __future__ import annotations

import datetime
import math
import tomllib
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import relative_limit
from hpc_core.case.select import matches
from hpc_core.gate.tolerance import exceeds
from hpc_core.gate.verdict import Excuse, Judgement, MetricVerdict, Verdict
from hpc_core.record import units as sizes
from hpc_core.record.metrics import definition_of
from hpc_core.record.record import Metric, Record


class Waiver(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file of waivers."""

    case: str
    """A glob over whole ids."""
    metric: str
    limit: str | int | float
    """How bad it may get: a percentage of the accepted value ("+5 %"), or a number in the metric's unit."""
    reason: str
    owner: str
    expires: datetime.date
    """The last day on which it holds, in UTC."""

    def __post_init__(self) -> None:
        """Check the entry.

        Raises:
            SpecError: an empty text, or a malformed limit.
        """
        for name in ("case", "metric", "reason", "owner"):
            if not getattr(self, name).strip():
                raise SpecError(f"{name} is empty: a waiver names its owner, its case, its metric and its reason.")
        if isinstance(self.limit, str):
            self._ratio()
        elif isinstance(self.limit, bool) or not math.isfinite(self.limit) or self.limit <= 0:
            raise SpecError(
                f"limit {self.limit!r}: a number above 0 in the metric's unit, or a percentage such as '+5 %'."
            )

    def _ratio(self) -> float | None:
        return relative_limit(self.limit.removeprefix("+")) if isinstance(self.limit, str) else None

    def covers(self, case_id: str) -> bool:
        """Return whether the glob matches a case."""
        return matches(case_id, [self.case])

    def is_over(self, today: datetime.date) -> bool:
        """Return whether its last day has passed."""
        return today > self.expires

    def allows(self, metric: Metric, accepted: float | None) -> bool:
        """Return whether a value is no worse than the waiver's limit; `accepted` is the baseline's value, if there is one."""
        ratio = self._ratio()
        if ratio is not None:
            return accepted is not None and _worse_by(metric, accepted) <= ratio * abs(accepted)
        assert not isinstance(self.limit, str)
        if metric.better == "same":
            near, far = sorted((self.limit, self.limit if accepted is None else accepted))
            return near <= metric.value <= far
        return not exceeds(metric, self.limit)

    def allows_more_than(self, other: Waiver) -> bool:
        """Return whether its limit is looser than another's of the same metric; so where one is a percentage and one an amount."""
        mine, its = self._ratio(), other._ratio()
        if mine is not None and its is not None:
            return mine > its
        if isinstance(self.limit, str) or isinstance(other.limit, str):
            return True
        definition = definition_of(self.metric)
        return self.limit < other.limit if definition and definition.better == "higher" else self.limit > other.limit

    def limit_text(self, unit: str) -> str:
        """Return the limit in words: "+5 %" or "8.00 GiB"."""
        if isinstance(self.limit, str):
            return f"+{self.limit.removeprefix('+')}"
        return sizes.quantity(self.limit, unit)


def _worse_by(metric: Metric, accepted: float) -> float:
    difference = metric.value - accepted
    return {"lower": difference, "higher": -difference, "same": abs(difference)}[metric.better]


def waivers_from_toml(text: str, where: str) -> tuple[Waiver, ...]:
    """Return the entries `[[waiver]]` of a file's text; `where` names the file in errors.

    Raises:
        SpecError: not TOML, an unknown key, an entry that lacks something, a bad date, or two entries of one case and metric.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{where}: not TOML: {error}.") from error
    entries = content.pop("waiver", [])
    if content or not isinstance(entries, list):
        unknown = ", ".join(sorted(content)) or "waiver"
        raise SpecError(f"{where}: holds {unknown}; it may hold entries [[waiver]] and nothing else.")
    found = tuple(_entry(entry, f"{where}, waiver {number}") for number, entry in enumerate(entries, start=1))
    named = [(waiver.case, waiver.metric) for waiver in found]
    twice = next((each for each in named if named.count(each) > 1), None)
    if twice is not None:
        raise SpecError(f"{where}: {twice[1]} of {twice[0]} is waived twice. Keep one entry.")
    return found


def _entry(entry: Any, where: str) -> Waiver:
    if isinstance(entry, dict) and isinstance(entry.get("expires"), datetime.datetime):
        raise SpecError(f"{where}: expires {entry['expires']}: give a day such as 2027-01-31, without a time.")
    try:
        return msgspec.convert(entry, Waiver, builtin_types=(datetime.date,))
    except (msgspec.ValidationError, SpecError) as error:
        raise SpecError(f"{where}: {error} An entry has case, metric, limit, reason, owner, expires.") from error


def waived(judgement: Judgement, record: Record, waivers: Iterable[Waiver], today: datetime.date) -> Judgement:
    """Return the judgement with an excuse for each REGRESSED metric that a waiver allows today; nothing else of it changes.

    Where a waiver names the metric but the value is beyond its limit, the metric's reason says so.
    """
    active = [waiver for waiver in waivers if waiver.covers(judgement.case) and not waiver.is_over(today)]
    if not active:
        return judgement
    excuses, rows = list(judgement.excuses), []
    for row in judgement.metrics:
        metric = record.metrics.get(row.metric)
        mine = [waiver for waiver in active if waiver.metric == row.metric]
        if row.verdict is not Verdict.REGRESSED or metric is None or not mine:
            rows.append(row)
            continue
        enough = next((waiver for waiver in mine if waiver.allows(metric, row.old)), None)
        if enough is not None:
            excuses.append(Excuse(metric=row.metric, text=_text(enough, metric.unit, today)))
        rows.append(row if enough is not None else _beyond(row, mine))
    return msgspec.structs.replace(judgement, metrics=tuple(rows), excuses=tuple(excuses))


def waived_since_base(
    judgement: Judgement, record: Record, here: Sequence[Waiver], base: Sequence[Waiver], today: datetime.date
) -> Judgement:
    """Return `waived` for a pull request: a waiver excuses only what one at the merge base excuses, too."""
    found = waived(judgement, record, here, today)
    allowed = {excuse.metric for excuse in waived(judgement, record, base, today).excuses}
    excuses = tuple(excuse for excuse in found.excuses if excuse.metric in allowed)
    refused = [excuse.metric for excuse in found.excuses if excuse.metric not in allowed]
    why = f"this pull request waives {', '.join(refused)}: a waiver counts from the merge on"
    return msgspec.structs.replace(found, excuses=excuses, remarks=(*found.remarks, *([why] if refused else [])))


def _beyond(row: MetricVerdict, waivers: Sequence[Waiver]) -> MetricVerdict:
    limits = " or ".join(f"{waiver.limit_text(row.unit)} by {waiver.owner}" for waiver in waivers)
    return msgspec.structs.replace(row, reason=f"{row.reason} It is waived only up to {limits}.")


def _text(waiver: Waiver, unit: str, today: datetime.date) -> str:
    days = (waiver.expires - today).days
    left = f"{sizes.counted(days, 'day')} left"
    return f"waived up to {waiver.limit_text(unit)} by {waiver.owner} until {waiver.expires} ({left}): {waiver.reason}"


def expired(waivers: Iterable[Waiver], today: datetime.date, case_id: str | None = None) -> tuple[str, ...]:
    """Return a sentence on each waiver whose last day has passed, of one case or of all."""
    return tuple(
        f"waiver of {waiver.metric} of {waiver.case} by {waiver.owner} expired on {waiver.expires} "
        f"({sizes.counted((today - waiver.expires).days, 'day')} ago): remove it or renew it"
        for waiver in waivers
        if waiver.is_over(today) and (case_id is None or waiver.covers(case_id))
    )
