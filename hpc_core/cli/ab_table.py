"""The result of an A/B for the terminal: both sides, every metric that differs beyond noise, what is undecided."""

from __future__ import annotations

from collections.abc import Sequence

from rich.cells import cell_len

from hpc_core.compare.ab import Comparison
from hpc_core.compare.arrange import Arranged
from hpc_core.compare.differences import Difference
from hpc_core.gate.comparability import packages_moved
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes

_HEAD = ("case", "metric", "base", "head", "change", "interval", "verdict", "")
_RIGHT = {"base", "head", "change"}
_MISSING = "-"


def heading(arranged: Arranged) -> list[str]:
    """Return both sides, and whose code measures."""
    return [f"base  {arranged.base.label}", f"head  {arranged.head.label}", arranged.measured_by, *arranged.notes]


def value_text(value: float | None, unit: str) -> str:
    """Return a value, or a dash."""
    return _MISSING if value is None else sizes.quantity(value, unit.partition(" per ")[0])


def interval_text(row: Difference) -> str:
    """Return where the change lies: "+8.1 … +12 %"."""
    if row.interval is None:
        return "exact" if row.noise == "exact" and row.verdict is not None else _MISSING
    low, high = (rounded(bound).removesuffix(" %") for bound in row.interval)
    return f"{low} … {high} %"


def rounded(ratio: float) -> str:
    """Return a ratio with the digits that noise allows: "+3.2 %", "+0.05 %", "+287 %"."""
    percent = ratio * 100
    decimals = 0 if abs(percent) >= 10 else 1 if abs(percent) >= 1 else 2
    return f"{percent:+,.{decimals}f} %"


def cases_text(number: int) -> str:
    """Return the number with its noun: "1 case", "18 cases"."""
    return "1 case" if number == 1 else f"{number} cases"


def _change(row: Difference) -> str:
    if row.ratio is None or row.ratio == 0:
        return _MISSING if row.ratio is None else "="
    return sizes.percent(row.ratio) if row.noise == "exact" else rounded(row.ratio)


def _cells(case: str, row: Difference) -> tuple[str, ...]:
    return (
        case,
        row.metric,
        value_text(row.base, row.unit),
        value_text(row.head, row.unit),
        _change(row),
        interval_text(row),
        "" if row.verdict is None else row.verdict.value,
        row.reason,
    )


def lines(comparison: Comparison, *, everything: bool) -> list[str]:
    """Return the table: what differs beyond noise and what gave no numbers; with `everything`, all metrics."""
    cells: list[tuple[str, ...]] = []
    for result in comparison.results:
        if result.failure is not None:
            cells.append((result.case, "", "", "", "", "", result.failure.upper(), result.reason))
        cells += [_cells(result.case, row) for row in result.rows if everything or row.differs]
    return _aligned([_HEAD, *cells]) if cells else []


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HEAD) - 1)]
    drawn = []
    for row in rows:
        parts = [
            " " * (width - cell_len(text)) + text if name in _RIGHT else text + " " * (width - cell_len(text))
            for name, width, text in zip(_HEAD, widths, row, strict=False)
        ]
        drawn.append("  ".join([*parts, row[-1]]).rstrip())
    return drawn


def summary(comparison: Comparison, seconds: float) -> list[str]:
    """Return how many differ, what is undecided, the chance of a false alarm, what moved around the code, how long it took."""
    rows = [(result.case, row) for result in comparison.results for row in result.rows if row.verdict is not None]
    counted = {verdict: sum(row.verdict is verdict for _, row in rows) for verdict in Verdict}
    counts = ", ".join(f"{number} {verdict.value}" for verdict, number in counted.items() if number)
    failed = [result for result in comparison.results if result.failure is not None]
    text = [f"{cases_text(len(comparison.results))}, {len(rows)} metrics judged: {counts or 'none'}; {seconds:.0f} s"]
    if failed:
        text[0] += f"; {cases_text(len(failed))} without numbers"
    if not any(row.differs for _, row in rows) and not failed:
        text.append("Nothing differs beyond noise.")
    undecided = [f"{case} {row.metric}" for case, row in rows if row.verdict is Verdict.INCONCLUSIVE]
    if undecided:
        more = f" and {len(undecided) - 3} more" if len(undecided) > 3 else ""
        text.append(f"Undecided: {', '.join(undecided[:3])}{more}; --all shows why, and what would decide it.")
    if comparison.metrics_judged:
        text.append(
            f"Expected false alarms in this run: at most {comparison.alpha:g}, over {comparison.metrics_judged} timed metrics together."
        )
    around = comparison.around
    if len(around) == 2:
        moved = packages_moved(around["base"].stack, around["head"].stack)
        if around["base"].python != around["head"].python:
            moved += (f"Python {around['base'].python} → {around['head'].python}",)
        if moved:
            text.append(f"Moved between the sides: {', '.join(moved)}.")
    return text
