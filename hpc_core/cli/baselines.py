"""`hpc-core baseline …`: list accepted numbers, compare records with them, and accept records made elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hpc_core.baselines import pull_request
from hpc_core.baselines.accept import accept, changes_between, refuse
from hpc_core.baselines.at_commit import PastBaselines, baseline_changes
from hpc_core.baselines.baseline import Baseline, Damaged, Lookup, Missing, OlderSchema
from hpc_core.baselines.lookup import find, parsed
from hpc_core.baselines.profiles import profile_to_keep
from hpc_core.case.errors import SpecError
from hpc_core.case.select import near
from hpc_core.cli.console import say, say_json, show
from hpc_core.explain.explain import stored_cause
from hpc_core.gate.exit_code import ExitCode
from hpc_core.gate.judge import judge
from hpc_core.record import units as sizes
from hpc_core.record.files import read_record, read_regular, write_whole
from hpc_core.record.record import Metric
from hpc_core.report.entry import Row
from hpc_core.report.lines import accepted_line, change_line, changed_metric

baseline_app = typer.Typer(
    help="Show accepted numbers, and accept new ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)
Folder = Annotated[Path, typer.Option("--baselines", help="The folder of baselines.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DEFAULT = Path("baselines")


def _need(root: Path) -> None:
    """Check that there is a folder of baselines.

    Raises:
        SpecError: there is none.
    """
    if not root.is_dir():
        raise SpecError(
            f"{root}: no such folder. Name it with --baselines, or write the first baseline with --perf-update."
        )


def _all(root: Path) -> list[tuple[str, str]]:
    """Return machine and case id of every file that could be a baseline.

    Raises:
        SpecError: the folder does not exist.
    """
    _need(root)
    paths = sorted(root.glob("*/*/*.json"))
    return [(path.parts[-3], f"{path.parts[-2]}/{path.stem}") for path in paths]


@baseline_app.command("list")
def list_all(baselines: Folder = DEFAULT, as_json: AsJson = False) -> None:
    """List the baselines: machine, case, and when and why they were accepted."""
    found = _all(baselines)
    if as_json:
        say_json([_as_json(machine, case, find(baselines, machine, case)) for machine, case in found])
        return
    if not found:
        say(f"{baselines} has no baselines.")
    for machine, case in found:
        say(f"{machine}  {case}  {_line(find(baselines, machine, case))}")


def _line(lookup: Lookup) -> str:
    if isinstance(lookup, Baseline):
        return f"{len(lookup.metrics)} metrics, accepted {lookup.accepted.at[:10]}: {lookup.accepted.reason}"
    if isinstance(lookup, Damaged):
        return f"DAMAGED: {lookup.reason}"
    return f"SCHEMA {lookup.found}, not {lookup.known}" if isinstance(lookup, OlderSchema) else "gone"


@baseline_app.command("show")
def show_one(
    case: Annotated[str, typer.Argument(help="A full id, such as tiny/lora.")],
    baselines: Folder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Show the accepted numbers of a case on every machine that has it."""
    found = _all(baselines)
    machines = [machine for machine, known in found if known == case]
    if not machines:
        close = near(case, [known for _, known in found])
        raise SpecError(f"{baselines} has no baseline of {case!r}. Near: {', '.join(close) or 'none'}.")
    if as_json:
        say_json([_as_json(machine, case, find(baselines, machine, case), metrics=True) for machine in machines])
        return
    for machine in machines:
        lookup = find(baselines, machine, case)
        say(f"{case} on {machine}: {_line(lookup)}")
        if isinstance(lookup, Baseline):
            stack = ", ".join(f"{name} {version}" for name, version in sorted(lookup.stack.items()))
            say(
                f"  digest {lookup.digest}, commit {lookup.accepted.commit or 'unknown'}, Python {lookup.python}, {stack}"
            )
            for name, value in sorted((lookup.settings or {}).items()):
                say(f"  setting {name}={value}")
            for name, metric in sorted(lookup.metrics.items()):
                say(f"  {name:<28} {sizes.quantity(metric.value, metric.unit)}")


@baseline_app.command("accept")
def accept_records(
    records: Annotated[
        list[Path],
        typer.Argument(help="Records of runs, or folders that --perf-records wrote, such as a GPU run's artifact."),
    ],
    reason: Annotated[str, typer.Option(help="Why these numbers are right; stored in the baseline.")],
    baselines: Folder = DEFAULT,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Also accept records of uncommitted code.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make records the baselines of their cases."""
    # Check all records first: one bad file must not leave half of them accepted.
    read = [read_record(path) for path in _files(records)]
    for record in read:
        refuse(record, reason, allow_dirty)
    done = []
    for record in read:
        done.append(accept(baselines, record, reason=reason, allow_dirty=allow_dirty))
        if not as_json:
            say(accepted_line(done[-1]))
    if as_json:
        say_json(done)


@baseline_app.command("add-profile")
def add_profile(
    records: Annotated[list[Path], typer.Argument(help="Records of runs, or folders that --perf-records wrote.")],
    baselines: Folder = DEFAULT,
    machine: Annotated[
        str,
        typer.Option(
            help="Add to the baselines of this machine (its folder), if the records are of another one: memory and operators, no kernels."
        ),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Add the records' profiles to unchanged baselines, for explanations. Refused if any byte or count differs.

    With --machine, records of cases without a baseline there are skipped. Nothing is written unless all others are sound.
    """
    found, without = [], []
    for record in (read_record(path) for path in _files(records)):
        if machine and (baselines / machine).is_dir() and isinstance(find(baselines, machine, record.case.id), Missing):
            without.append(record.case.id)
        else:
            found.append(profile_to_keep(baselines, record, machine))
    for path, packed in found:
        write_whole(path, packed)
    if as_json:
        say_json({"wrote": [str(path) for path, _ in found], "without_baseline": without})
        return
    for path, _ in found:
        say(f"wrote {path}")
    if without:
        say(f"skipped, since {machine} has no baseline of them: {', '.join(without)}")


def _files(paths: list[Path]) -> list[Path]:
    """Return these files, and those below these folders.

    Raises:
        SpecError: a folder has no record.
    """
    found: list[Path] = []
    for path in paths:
        below = sorted(path.rglob("*.json")) if path.is_dir() else []
        records = [each for each in below if each.name != pull_request.NAME and not each.name.startswith(".")]
        if path.is_dir() and not records:
            raise SpecError(f"{path}: the folder has no record (*.json).")
        found += records or [path]
    return found


@baseline_app.command()
def diff(
    one: Annotated[str, typer.Argument(help="A record's file, a baseline's file, or a git revision.")],
    other: Annotated[str | None, typer.Argument(help="Another of the same kind; without it, the working tree.")] = None,
    baselines: Folder = DEFAULT,
    as_json: AsJson = False,
) -> None:
    """Show what differs: a record from its baseline (exit code 1 if it would fail), two files, or the baselines of two revisions."""
    files = [_is_file(each) for each in (one, other) if each is not None]
    if any(files) and not all(files):
        raise SpecError(f"{one} and {other}: compare two files, or two git revisions.")
    if other is not None and any(files):
        _of_files(Path(one), Path(other), as_json=as_json)
    elif any(files):
        _judge(Path(one), baselines, as_json=as_json)
    else:
        _of_revisions(one, other, baselines, as_json=as_json)


def _is_file(text: str) -> bool:
    """Return whether this names a file, there or not, rather than a revision."""
    path = Path(text)
    return path.suffix == ".json" or (path.exists() and not path.is_dir())


def _judge(path: Path, baselines: Path, *, as_json: bool) -> NoReturn:
    record = read_record(path)
    _need(baselines)
    lookup = find(baselines, record.circumstances.machine.key, record.case.id)
    judgement = judge(record, lookup)
    cause = stored_cause(baselines, record, judgement)
    if as_json:
        say_json({"judgement": judgement, "cause": cause})
    else:
        show([Row(record=record, judgement=judgement, cause=cause)])
        for row in judgement.metrics:
            if row.change:
                say(f"  {row.verdict:<12} {row.reason}")
    raise typer.Exit(ExitCode.FAILED if judgement.outcome() == "failed" else ExitCode.OK)


def _of_files(one: Path, other: Path, *, as_json: bool) -> None:
    (name, old), (newer, new) = (_metrics(path) for path in (one, other))
    changes = changes_between(old, new)
    if as_json:
        say_json({"old": name, "new": newer, "changes": changes})
        return
    lines = [f"  {changed_metric(change)}" for change in changes]
    for line in (f"{name} → {newer}:", *(lines or ["  all metrics are equal"])):
        say(line)


def _metrics(path: Path) -> tuple[str, dict[str, Metric]]:
    """Return the name and the metrics of a record or a baseline.

    Raises:
        SpecError: the file is neither of them.
    """
    lookup = parsed(str(path), read_regular(path))
    if isinstance(lookup, Baseline):
        return f"{lookup.machine.key}/{lookup.case} ({path})", lookup.metrics
    record = read_record(path)
    return f"{record.circumstances.machine.key}/{record.case.id} ({path})", record.metrics


def _of_revisions(one: str, other: str | None, baselines: Path, *, as_json: bool) -> None:
    _need(baselines)
    old = PastBaselines(baselines, one)
    new = None if other is None else PastBaselines(baselines, other)
    changes = baseline_changes(baselines, old, new)
    if as_json:
        say_json(
            [
                {"machine": each.machine, "case": each.case, "reason": each.reason, "changes": each.metrics}
                for each in changes
            ]
        )
        return
    lines = [change_line(change) for change in changes]
    where = f"{old.commit[:10]}..{'here' if new is None else new.commit[:10]}"
    for line in lines or [f"No baseline changed in {where}."]:
        say(line)


def _as_json(machine: str, case: str, lookup: Lookup, *, metrics: bool = False) -> dict[str, Any]:
    """Return machine, case and `state` ("sound", "damaged", "other schema", "gone"); for a sound baseline also its acceptance and metrics."""
    content: dict[str, Any] = {"machine": machine, "case": case}
    if isinstance(lookup, Baseline):
        content |= {"state": "sound", "digest": lookup.digest, "accepted": lookup.accepted, "stack": lookup.stack}
        return content | ({"metrics": lookup.metrics} if metrics else {"metric_count": len(lookup.metrics)})
    if isinstance(lookup, Damaged):
        return content | {"state": "damaged", "reason": lookup.reason}
    if isinstance(lookup, OlderSchema):
        return content | {"state": "other schema", "schema": lookup.found}
    return content | {"state": "gone"}
