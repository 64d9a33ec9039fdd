"""`hpc-core baseline …`: what is accepted, what a record would change, and accepting records made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_core.cli.console import say, show
from hpc_core.cli.running import read_record
from hpc_core.errors import SpecError
from hpc_core.gate import judge, sizes
from hpc_core.report import Row
from hpc_core.report.row import accepted_line
from hpc_core.selection import near
from hpc_core.store import Baseline, Damaged, Lookup, OlderSchema, accept, find

__all__ = ["baseline_app"]

baseline_app = typer.Typer(
    help="Look at accepted numbers, and accept new ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Option("--baselines", help="The folder of baselines.")]
DEFAULT = Path("baselines")


def _all(root: Path) -> list[tuple[str, str]]:
    """Machine and case id of every file that could be a baseline.

    Raises:
        SpecError: there is no such folder.
    """
    if not root.is_dir():
        raise SpecError(
            f"{root}: no such folder. Name it with --baselines, or write the first baseline with --perf-update."
        )
    paths = sorted(root.glob("*/*/*.json"))
    return [(path.parts[-3], f"{path.parts[-2]}/{path.stem}") for path in paths]


@baseline_app.command("list")
def list_all(baselines: Folder = DEFAULT) -> None:
    """List the baselines: machine, case, when and why accepted."""
    found = _all(baselines)
    if not found:
        say(f"{baselines} holds no baseline.")
    for machine, case in found:
        say(f"{machine}  {case}  {_line(find(baselines, machine, case))}")


def _line(lookup: Lookup) -> str:
    if isinstance(lookup, Baseline):
        return f"{len(lookup.metrics)} metrics, accepted {lookup.accepted.at[:10]}: {lookup.accepted.reason}"
    if isinstance(lookup, Damaged):
        return f"DAMAGED: {lookup.reason}"
    return f"SCHEMA {lookup.found}, not {lookup.known}" if isinstance(lookup, OlderSchema) else "gone"


@baseline_app.command("show")
def show_one(case: Annotated[str, typer.Argument(help="A whole id.")], baselines: Folder = DEFAULT) -> None:
    """Show what is accepted for a case, on every machine that has it."""
    found = _all(baselines)
    machines = [machine for machine, known in found if known == case]
    if not machines:
        close = near(case, [known for _, known in found])
        raise SpecError(f"{baselines} has no baseline of {case!r}. Near: {', '.join(close) or 'none'}.")
    for machine in machines:
        lookup = find(baselines, machine, case)
        say(f"{case} on {machine}: {_line(lookup)}")
        if isinstance(lookup, Baseline):
            stack = ", ".join(f"{name} {version}" for name, version in sorted(lookup.stack.items()))
            say(f"  digest {lookup.digest}, commit {lookup.accepted.commit or 'unknown'}, {stack}")
            for name, metric in sorted(lookup.metrics.items()):
                say(f"  {name:<28} {sizes.quantity(metric.value, metric.unit)}")


@baseline_app.command("accept")
def accept_records(
    records: Annotated[list[Path], typer.Argument(help="Records of runs, such as a GPU run's artifact.")],
    reason: Annotated[str, typer.Option(help="Why these numbers are right; kept in the baseline.")],
    baselines: Folder = DEFAULT,
) -> None:
    """Make records the baselines of their cases."""
    read = [
        read_record(path) for path in records
    ]  # all of them first: one bad file must not leave half of them accepted
    for record in read:
        say(accepted_line(accept(baselines, record, reason=reason)))


@baseline_app.command()
def diff(record: Annotated[Path, typer.Argument(help="The record of a run.")], baselines: Folder = DEFAULT) -> None:
    """Judge a record against its baseline without running anything. Exit code 1 if it would fail."""
    seen = read_record(record)
    lookup = find(baselines, seen.circumstances.machine.key, seen.case.id)
    judgement = judge(seen, lookup)
    show([Row(record=seen, judgement=judgement)])
    for row in judgement.metrics:
        if row.change:
            say(f"  {row.verdict:<12} {row.reason}")
    raise typer.Exit(1 if judgement.verdict.outcome() == "failed" else 0)
