"""Gains to keep: one command that accepts every case which is better than its baseline allows for."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_core.gate import Verdict
from hpc_core.report.row import Row

__all__ = ["keep_gains"]

_CASE = " --case "


def keep_gains(rows: Sequence[Row]) -> tuple[str, ...]:
    """A sentence and the command, one for each place that cases run from; nothing where nothing improved.

    A case with something worse beside its gain is not among them: accepting it would accept both.
    """
    better = [row for row in rows if row.judgement is not None and row.judgement.verdict is Verdict.IMPROVED]
    if not better:
        return ()
    chosen: dict[str, list[str]] = {}
    for row in better:
        start, _, case = (row.command or f"pytest --benchmark{_CASE}'{row.case}'").partition(_CASE)
        chosen.setdefault(start, []).append(case)
    many = f"{len(better)} cases are" if len(better) > 1 else f"{better[0].case} is"
    commands = [
        f'    {start}{"".join(_CASE + case for case in cases)} --perf-update --reason "…"'
        for start, cases in chosen.items()
    ]
    return f"{many} better than accepted. Keep the gain, so that it cannot be lost unseen:", *commands
