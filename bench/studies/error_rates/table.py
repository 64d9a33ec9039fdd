"""Format error rates as lines for a terminal."""

from __future__ import annotations

import math

from bench.studies.error_rates.metric_rates import (
    BUSY_PAIRS,
    POWER,
    WALL_PAIRS,
    Rate,
    Side,
)
from bench.studies.error_rates.rates import ErrorRates

__all__ = ["table"]

_HEAD = (
    "case",
    "metric",
    "noise",
    "within",
    "between",
    "A/B alarms",
    "A/B sees",
    "stored alarms",
    "stored sees",
    "others alarm",
)


def table(rates: ErrorRates) -> str:
    """Return a line for each metric that varies, a sentence on the exact ones, and the suite as a whole."""
    noisy = [rate for rate in rates.rates if rate.noise != "exact"]
    lines = [_HEAD, *(_cells(rate) for rate in noisy)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    drawn = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*drawn, "", *_exact(rates), *_suite(rates)])


def _cells(rate: Rate) -> tuple[str, ...]:
    worst = max(rate.others, key=lambda rule: rate.others[rule], default=None)
    return (
        rate.case,
        rate.metric,
        rate.noise,
        _percent(rate.within) if rate.processes > rate.starts else "-",
        "-" if rate.between is None else _percent(rate.between),
        *_side(rate.paired),
        *_side(rate.stored),
        "-" if worst is None else f"{_percent(rate.others[worst])} {worst}" if rate.others[worst] else "none does",
    )


def _side(side: Side | None) -> tuple[str, str]:
    if side is None:
        return "-", "-"
    return _percent(side.alarms), _percent(side.detects) if math.isfinite(side.detects) else "nothing"


def _percent(ratio: float) -> str:
    if abs(ratio) >= 10:
        return f"{ratio:.0f} times"
    return f"{100 * ratio:.2g} %" if abs(ratio) < 0.1 else f"{100 * ratio:.0f} %"


def _exact(rates: ErrorRates) -> list[str]:
    exact = [rate for rate in rates.rates if rate.noise == "exact"]
    moved = [rate for rate in exact if rate.within or rate.between]
    lines = [f"exact: {len(exact) - len(moved)} of {len(exact)} metrics were equal in every process"]
    for rate in moved:
        alarms = "" if rate.paired is None else f"; {_percent(rate.paired.alarms)} of comparisons alarm"
        lines.append(f"  {rate.case} {rate.metric} is not: spread {_percent(rate.within)}{alarms}")
    return lines


def _suite(rates: ErrorRates) -> list[str]:
    kind = "1 start" if rates.starts == 1 else f"{rates.starts} starts"
    cards = "1 machine" if rates.gpus == 1 else f"{rates.gpus} machines"
    lines = [
        f"{kind} of {cards}; {rates.tests} tests share {rates.alpha:g} false alarms a run",
        f"sees: the least change that is REGRESSED in {POWER:.0%} of comparisons; A/B with {BUSY_PAIRS} processes a side"
        f" ({WALL_PAIRS} for wall time), stored: against the other starts",
    ]
    if rates.starts < 2:
        return [*lines, "Stored baselines and other rules need a second start: run again with the same --out."]
    if rates.suite is None:
        lines.append("suite runs with a false alarm of the gate: none, since it judges no time here (no GPU)")
    else:
        drawn = f"{_percent(rates.suite)} (drawn by start)"
        apart = f"{rates.alarmed} of {rates.comparisons}, so at most {_percent(rates.bound)}"
        lines += [
            f"suite runs with a false alarm of the gate: {drawn}",
            f"  by comparisons that share no start: {apart}",
        ]
    for noise, rules in rates.suite_others.items():
        lines += [f"  of {rule} on {noise} time: {_percent(share)}" for rule, share in rules.items()]
    return lines
