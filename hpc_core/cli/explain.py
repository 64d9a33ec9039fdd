"""`hpc-core explain RECORD`: say why a record differs from its baseline, from files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_core.baselines.lookup import find
from hpc_core.case.errors import SpecError
from hpc_core.cli.console import say, say_json
from hpc_core.explain.before import before_of, stored_before
from hpc_core.explain.explain import Cause, explain
from hpc_core.explain.time import split_line
from hpc_core.gate.judge import judge
from hpc_core.record.files import read_record
from hpc_core.record.record import Record


def explain_record(
    record: Annotated[Path, typer.Argument(help="A record file, as --perf-records and run --json write it.")],
    against: Annotated[
        Path | None, typer.Option(help="Another record to compare with, instead of the baseline.")
    ] = None,
    baselines: Annotated[Path, typer.Option("--baselines", help="The folder of baselines.")] = Path("baselines"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the cause as JSON.")] = False,
) -> None:
    """Say why a record differs from its baseline: two lines, then details. Nothing runs, and nothing is judged."""
    now = read_record(record)
    cause = _cause(now, baselines) if against is None else _between(read_record(against), now)
    if as_json:
        say_json({"case": now.case.id, "cause": cause})
        return
    say(f"{now.case.id} on {now.circumstances.machine.key}")
    if (split := split_line(now)) is not None:
        say(f"  {split}")
    for line in ("nothing differs",) if cause is None else cause.lines:
        say(f"  {line}")
    for detail in () if cause is None else cause.details:
        say(f"    {detail}")


def _between(before: Record, now: Record) -> Cause | None:
    if before.case.id != now.case.id:
        raise SpecError(
            f"--against is a record of {before.case.id}, not of {now.case.id}. Compare records of one case."
        )
    for each in (before, now):
        _refuse_failed(each)
    return explain(before_of(before), now)


def _cause(now: Record, baselines: Path) -> Cause | None:
    """Return why the record differs from its stored baseline.

    Raises:
        SpecError: the run failed, or its case has no sound baseline.
    """
    _refuse_failed(now)
    key = now.circumstances.machine.key
    lookup = find(baselines, key, now.case.id)
    before = stored_before(baselines, key, lookup)
    if before is None:
        judgement = judge(now, lookup)
        raise SpecError(f"{judgement.reason} Name a folder with --baselines, or a record with --against.")
    return explain(before, now, judge(now, lookup))


def _refuse_failed(record: Record) -> None:
    if record.failure is not None:
        raise SpecError(
            f"{record.case.id} {record.failure.kind} in {record.failure.phase}: there is nothing to explain."
        )
