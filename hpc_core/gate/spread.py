"""Judge wall time and energy, which move with the host: worse is what lies beyond the spread of the accepted sessions.

Wall time is compared in seconds where the device sets the pace. Elsewhere the host does, and it is compared in units of the host
canary (`hpc_core.instruments.wall`), which ran beside every timed call: a busy or slower host stretches both.

Most sessions of one code differ by more than a useful limit, so three verdicts would make INCONCLUSIVE the rule. A run is REGRESSED
beyond what a clean one exceeds by chance, else PASS, and the reason says what would have been seen.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from hpc_core.gate.busy import Evidence, Sessions
from hpc_core.gate.intervals import (
    PASS_ALPHA,
    Distance,
    Interval,
    Spread,
    interval_of,
    reach,
    required_sample_size,
    stored_distance,
)
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.metrics import canaries_of
from hpc_core.record.record import Metric

GROSS_RATIO = 1.0
"""+100 %: what is worse even if nothing is known of the spread."""
DEVICE_BOUND = 0.5
"""From this share of wall time on, the device sets the pace."""
ENERGY = Spread(
    within=0.03,
    between=0.10,
    degrees=5.0,
    source="between the pooled 5.8 % of our engines (23 cases) and 13.5 % of stock ones (18 cases) on several H100s and H200s",
)
"""What a session's energy moves by, until five are stored. Within: the age of the counter's readings."""
HOST = Spread(
    within=0.01,
    between=0.015,
    degrees=10.0,
    source="a token in canaries: 1.0 % between ten processes on one H200 host, quiet and busy, and 1.5 % between starts",
    lasting=True,
)
"""What a time in canaries moves by on a GPU machine."""
_SHARES = {"time_to_first_token_s": "busy_share_prefill"}


class SpreadFinding(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on one number."""

    verdict: Verdict
    limit: str
    """What was allowed: "+12.4 %"."""
    text: str
    """What follows the values and the limit: the change, what it rests on, and what would be seen."""
    interval: Interval | None = None
    """None where no spread is known."""
    settled_by: str = ""
    remark: str = ""
    """Why a number passes although the one that is shown is beyond the limit; empty if it is not."""


def judge_spread(
    name: str, new: Metric, old: Metric, ratio: float, evidence: Evidence, *, stated: bool
) -> SpreadFinding:
    """Return the verdict on one number.

    The sessions and what is assumed of their spread set the limit: what a clean run exceeds with probability `evidence.alpha`, at
    least `ratio` and at most `GROSS_RATIO`. One session shows no spread; where none is assumed either, only gross changes fail,
    and only if every process shows them. A limit that an owner states replaces that one: within it a run is PASS, beyond it REGRESSED if that is certain
    or gross, else INCONCLUSIVE.

    Args:
        name: of the metric.
        new: its value.
        old: the accepted value.
        ratio: the tolerance.
        evidence: values of this run's processes and of the accepted sessions.
        stated: whether the case's owner stated `ratio`.
    """
    figures = _figures(name, evidence)
    values = {each: tuple(evidence.processes.get(each, ())) or (float(new.value),) for each in figures}
    sessions = {each: tuple(evidence.sessions.get(each, ())) or ((float(old.value),),) for each in figures}
    if not all(
        math.isfinite(value) and value > 0 for each in figures for value in _every(values[each], sessions[each])
    ):
        text = f"; but {name} of this or an accepted session is not above 0."
        return SpreadFinding(verdict=Verdict.INVALID, limit=_text(ratio), text=text)
    assumed = _assumed(name, new.unit, evidence.sessions)
    compared = {each: stored_distance(values[each], sessions[each], assumed, one=evidence.one) for each in figures}
    distance = compared[figures[-1]]
    interval, gross = interval_of(distance, evidence.alpha), _gross(values, compared)
    known = interval if math.isfinite(distance.deviation) else None
    unit = " in units of the host canary" if len(figures) > 1 else ""
    moved = f": {_percent(interval.centre)}{unit} by {interval.text}"
    shown = float(new.value) / float(old.value) - 1
    if stated:
        return _remarked(_stated(distance, ratio, evidence.alpha, gross, moved, known), shown, ratio, moved)
    if known is None:
        partly = f" in every {evidence.one}" if interval.centre > GROSS_RATIO and gross is Verdict.PASS else ""
        text = f"{moved}; one accepted session shows no spread, so only {_text(GROSS_RATIO)}{partly} counts."
        found = SpreadFinding(verdict=gross, limit=_text(GROSS_RATIO), text=text)
        return _remarked(found, shown, GROSS_RATIO, moved + (f", not{partly}" if partly else ""))
    least = _within_gross(reach(distance.deviation, distance.degrees, evidence.alpha), least=ratio)
    seen = _within_gross(math.log1p(least) + reach(distance.deviation, distance.degrees, PASS_ALPHA))
    text = f"{moved}; {_text(seen)} would be seen in 95 % of runs."
    # As far out as with one session, a run must be as far out by the same measure.
    verdict = gross if least >= GROSS_RATIO else _beyond(interval.centre, least)
    found = SpreadFinding(verdict=verdict, limit=_text(least), text=text, interval=known)
    return _remarked(found, shown, least, moved)


def _remarked(found: SpreadFinding, shown: float, limit: float, moved: str) -> SpreadFinding:
    """Add a remark where the number that is shown, of the first process, is beyond the limit and all together are not."""
    if found.verdict is not Verdict.PASS or shown <= limit:
        return found
    text = f"{_percent(shown)} as shown is beyond the limit {found.limit}, and passes{moved}."
    return msgspec.structs.replace(found, remark=text)


def _stated(
    distance: Distance, ratio: float, alpha: float, gross: Verdict, moved: str, known: Interval | None
) -> SpreadFinding:
    def verdict(distance: Distance) -> Verdict:
        at = interval_of(distance, alpha)
        if at.centre <= ratio:
            return Verdict.PASS
        return Verdict.REGRESSED if at.low > ratio or gross is Verdict.REGRESSED else Verdict.INCONCLUSIVE

    found, settled, doubt = verdict(distance), "", ""
    if found is Verdict.INCONCLUSIVE:
        settled = required_sample_size(distance, lambda more: verdict(more) is not Verdict.INCONCLUSIVE)
        doubt = "; that may be noise"
    text = f"{moved}{doubt}."
    return SpreadFinding(verdict=found, limit=_text(ratio), text=text, interval=known, settled_by=settled)


def spread_is_known(name: str, unit: str, sessions: Sessions) -> bool:
    """Return whether anything is known of how far a number moves, so that its verdict takes a share of the false alarms."""
    return len(sessions.get(name, ())) > 1 or (name in sessions and _assumed(name, unit, sessions) is not None)


def _assumed(name: str, unit: str, sessions: Sessions) -> Spread | None:
    """Return what is assumed: of seconds nothing, nor of times on a machine without a GPU, whose hosts are of many kinds."""
    if unit == "J":
        return ENERGY
    in_canaries = canaries_of(name) in sessions and not _device_bound(name, sessions)
    return HOST if in_canaries and _SHARES.get(name, "busy_share") in sessions else None


def lacks_canary(name: str, evidence: Evidence) -> bool:
    """Return whether a wall time cannot be compared: the host sets its pace, and no accepted session holds its canary."""
    return not _device_bound(name, evidence.sessions) and canaries_of(name) not in evidence.sessions


def _device_bound(name: str, sessions: Sessions) -> bool:
    share = _SHARES.get(name, "busy_share")
    accepted = [value for session in sessions.get(share, ()) for value in session]
    return bool(accepted) and statistics.median(accepted) >= DEVICE_BOUND


def _figures(name: str, evidence: Evidence) -> tuple[str, ...]:
    """Return what is compared: the number itself, and a time in canaries too where the host sets the pace. The last one decides."""
    ratio = canaries_of(name)
    if _device_bound(name, evidence.sessions):
        return (name,)
    return (name, ratio) if ratio in evidence.processes and ratio in evidence.sessions else (name,)


def _every(values: Sequence[float], sessions: Sequence[Sequence[float]]) -> list[float]:
    return [*values, *(value for session in sessions for value in session)]


def _gross(values: Mapping[str, Sequence[float]], compared: Mapping[str, Distance]) -> Verdict:
    """Return REGRESSED or IMPROVED where every process moved beyond `GROSS_RATIO` by every figure, else PASS."""
    moved = []
    for figure, ours in values.items():
        logs = [math.log(value) for value in ours]
        accepted = statistics.median(logs) - compared[figure].centre
        moved += [value - accepted for value in logs]
    if min(moved) > math.log1p(GROSS_RATIO):
        return Verdict.REGRESSED
    return Verdict.IMPROVED if max(moved) < -math.log1p(GROSS_RATIO) else Verdict.PASS


def _within_gross(log_ratio: float, least: float = 0.0) -> float:
    return max(least, math.expm1(min(log_ratio, math.log1p(GROSS_RATIO))))


def _beyond(centre: float, least: float) -> Verdict:
    if centre > least:
        return Verdict.REGRESSED
    return Verdict.IMPROVED if (1 + centre) * (1 + least) < 1 else Verdict.PASS


def _percent(ratio: float) -> str:
    return sizes.percent(round(ratio, 3))


def _text(ratio: float) -> str:
    return f"+{_percent(ratio).removeprefix('+')}"
