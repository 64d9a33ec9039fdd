"""Compute error rates on one metric of one case from A/A samples: of the gate's own functions, and of other tools' rules.

An A/B is drawn from the processes' differences to their start; a comparison with stored sessions draws starts, none twice, and
processes within them.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import msgspec

from bench.studies.error_rates.other_rules import OTHER_RULES
from bench.studies.error_rates.samples import Declared
from hpc_core.gate.intervals import (
    LEAST_SESSIONS,
    SPREADS,
    Interval,
    family_of,
    interval_of,
    paired_distance,
    stored_distance,
)
from hpc_core.gate.tolerance import BUSY_RATIOS, PAIRED_RATIO, beyond, tolerance
from hpc_core.gate.verdict import Verdict
from hpc_core.record.record import Metric

__all__ = ["BUSY_PAIRS", "POWER", "WALL_PAIRS", "Rate", "Side", "against_stored", "processes", "rate", "residuals"]

POWER = 0.95
PROCESSES = 3
"""Processes per session, in the suite and on either side of an A/B of busy time."""
BUSY_PAIRS = PROCESSES
WALL_PAIRS = 24
"""Wall time is noisier, so its A/B uses the most pairs that its rule allows."""
WALL_RATIO = 0.05
_WALL_FLOOR = 0.003
"""Minimum standard deviation of wall time between sessions."""


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """The error rates of one rule on one metric."""

    alarms: float
    """Share of comparisons of unchanged code that are REGRESSED."""
    detects: float
    """The least ratio that is REGRESSED with 95 % power; infinite if none."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one case."""

    case: str
    metric: str
    noise: str
    starts: int
    processes: int
    """Over all starts."""
    within: float
    """Standard deviation between processes of a start, as a ratio."""
    between: float | None
    """Standard deviation of the starts' medians; None for a single start."""
    paired: Side | None
    """An A/B in one session; None if no start has two processes."""
    stored: Side | None
    """Against stored sessions; None for a single start, or for wall time with fewer than six."""
    others: dict[str, float]
    """False alarms of other tools' rules, one start against another; empty for a single start."""


def rate(
    case: str,
    name: str,
    declared: Declared,
    held: list[tuple[float, ...]],
    level: float,
    generator: random.Random,
    resamples: int,
) -> Rate:
    """Return the rates of the gate and of other rules on one metric; `held` are its values by start, `level` that of one test."""
    exact = declared.noise == "exact"
    within, between = _spreads(held)
    several = [values for values in held if len(values) > 1]
    paired = stored = None
    if exact:
        every = [value for values in held for value in values]
        paired = stored = _exact(name, every, declared) if len(every) > 1 else None
    else:
        if several:
            about = residuals(several)
            paired = _side(
                [_ab(name, declared, about, level, generator) for _ in range(resamples)], _paired_ratio(declared)
            )
        if len(held) > (1 if declared.noise == "busy" else LEAST_SESSIONS):
            found = [against_stored(name, declared, *_drawn(held, generator), level) for _ in range(resamples)]
            stored = _side(found, _stored_ratio(name, declared))
    return Rate(
        case=case,
        metric=name,
        noise=declared.noise,
        starts=len(held),
        processes=sum(map(len, held)),
        within=within,
        between=between,
        paired=paired,
        stored=stored,
        others={} if exact else _others(held),
    )


def _spreads(held: list[tuple[float, ...]]) -> tuple[float, float | None]:
    """Return standard deviations of ratios to the mean, which also work for exact metrics with a value of zero."""
    mean = statistics.fmean(value for values in held for value in values) or 1.0
    degrees = sum(len(values) - 1 for values in held)
    squares = math.fsum((value - statistics.fmean(values)) ** 2 for values in held for value in values)
    within = math.sqrt(squares / degrees) / abs(mean) if degrees else 0.0
    medians = [statistics.median(values) for values in held]
    return within, statistics.stdev(medians) / abs(mean) if len(medians) > 1 else None


def _exact(name: str, values: list[float], declared: Declared) -> Side:
    """Compare every process with every other: exact metrics alarm only if they are not exact, and detect by their tolerance."""
    counts = Counter(values)
    made = {value: _metric(value, declared) for value in counts}
    alarms = sum(
        counts[old] * counts[new]
        for old, new in permutations(counts, 2)
        if beyond(made[old], new, tolerance(name, made[old])) is Verdict.REGRESSED
    )
    least = min(abs(value) for value in counts)
    step = tolerance(name, made[values[0]]).distance or 1.0
    return Side(alarms=alarms / (len(values) * (len(values) - 1)), detects=step / least if least else math.inf)


def _metric(value: float, declared: Declared) -> Metric:
    return Metric(value=value, unit=declared.unit, noise="exact", better=declared.better, depends_on=("case", "stack"))


def residuals(held: list[tuple[float, ...]]) -> list[float]:
    """Return each process's log ratio to its start, scaled up because a mean of few processes is close to them."""
    found = []
    for values in held:
        logs = [math.log(value) for value in values]
        mean, wider = statistics.fmean(logs), math.sqrt(len(logs) / (len(logs) - 1))
        found += [(log - mean) * wider for log in logs]
    return found


def _side(intervals: Sequence[Interval], ratio: float) -> Side:
    """Return the least detectable change. All rules use log ratios, so a change shifts an interval by the same amount."""
    needs = sorted(math.log1p(ratio) - (math.log1p(i.low) if i.low > -1 else -math.inf) for i in intervals)
    most = needs[min(len(needs) - 1, math.ceil(POWER * len(needs)) - 1)]
    return Side(
        alarms=sum(need < 0 for need in needs) / len(needs),
        detects=math.expm1(most) if most < 700 else math.inf,  # beyond, a float overflows
    )


def _paired_ratio(declared: Declared) -> float:
    return PAIRED_RATIO if declared.noise == "busy" else WALL_RATIO


def _stored_ratio(name: str, declared: Declared) -> float:
    return BUSY_RATIOS[family_of(name)] if declared.noise == "busy" else WALL_RATIO


def _ab(name: str, declared: Declared, about: list[float], level: float, generator: random.Random) -> Interval:
    busy = declared.noise == "busy"
    count = BUSY_PAIRS if busy else WALL_PAIRS
    base, head = ([math.exp(generator.choice(about)) for _ in range(count)] for _ in range(2))
    return interval_of(paired_distance(base, head, SPREADS[family_of(name)] if busy else None), level)


def _drawn(held: list[tuple[float, ...]], generator: random.Random) -> tuple[list[list[float]], list[float]]:
    """Draw stored sessions and a new session from different starts."""
    new, *old = generator.sample(range(len(held)), len(held))
    return [processes(held[start], generator) for start in old], processes(held[new], generator)


def processes(values: tuple[float, ...], generator: random.Random) -> list[float]:
    """Draw as many processes as a session of the suite has, none twice."""
    return generator.sample(values, min(PROCESSES, len(values)))


def against_stored(
    name: str, declared: Declared, sessions: list[list[float]], new: list[float], level: float
) -> Interval:
    """Return the interval that the suite would use; for wall time, that of its history."""
    if declared.noise == "wall":
        return history_interval(new, sessions, level)
    return interval_of(stored_distance(new, sessions, SPREADS[family_of(name)]), level)


def _others(held: list[tuple[float, ...]]) -> dict[str, float]:
    pairs = list(permutations(held, 2))
    if not pairs:
        return {}
    return {rule: sum(judge(old, new) for old, new in pairs) / len(pairs) for rule, judge in OTHER_RULES.items()}


def history_interval(
    new: Sequence[float],
    sessions: Sequence[Sequence[float]],
    alpha: float,
    *,
    canary: Sequence[float] = (),
    canaries: Sequence[Sequence[float]] = (),
) -> Interval:
    """Return the interval of wall time against at least five stored sessions, whose drift a canary can take out.

    `canary` is the time of work that no code changes, in this session; `canaries` are those of the stored sessions, in order.
    Fewer than five sessions give an interval without bounds, and its text says so.
    """
    steady = bool(canary) and len(canaries) == len(sessions) and all(canaries)
    if steady:
        new = _relative_to(new, canary)
        sessions = [_relative_to(one, other) for one, other in zip(sessions, canaries, strict=True)]
    distance = stored_distance(new, sessions, None, floor=_WALL_FLOOR)
    drift = ", drift by the canary taken out" if steady else ", no canary in each of them"
    if len(sessions) < LEAST_SESSIONS:
        text = f"{len(sessions)} of the {LEAST_SESSIONS} stored sessions that wall time needs"
        distance = msgspec.structs.replace(distance, session_variance=math.inf, text=text)
        return interval_of(distance, alpha)
    return interval_of(msgspec.structs.replace(distance, text=distance.text + drift), alpha)


def _relative_to(values: Sequence[float], canary: Sequence[float]) -> list[float]:
    middle = statistics.median(canary)
    return [value / middle for value in values]
