"""What a passing run should still accept: gains to keep, and metrics that are new. One command for all cases of a kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hpc_core.gate.verdict import Verdict
from hpc_core.report.row import Row

_CASE = " --case "


def keep_gains(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return a sentence and the commands that accept every case that improved; nothing where none did.

    A case where something else got worse is left out: accepting it would accept both.
    """
    better = [row for row in rows if row.judgement is not None and row.judgement.verdict is Verdict.IMPROVED]
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
        new = [each.metric for each in row.judgement.metrics if not each.judged]
        if new:
            found[row.case] = row
            names |= dict.fromkeys(new)
    if not found:
        return ()
    who = f"{len(found)} cases" if len(found) > 1 else next(iter(found))
    sentence = f"New, not judged in {who}: {', '.join(names)}. The baseline does not hold it yet. To have it judged:"
    return sentence, *_commands(found.values())


def _commands(rows: Iterable[Row]) -> list[str]:
    """Return one command that accepts these cases for each place that cases run from."""
    chosen: dict[str, list[str]] = {}
    for row in rows:
        start, _, case = (row.command or f"pytest --benchmark{_CASE}'{row.case}'").partition(_CASE)
        chosen.setdefault(start, []).append(case)
    return [
        f'    {start}{"".join(_CASE + case for case in cases)} --perf-update --reason "…"'
        for start, cases in chosen.items()
    ]
