"""`hpc-core ab`: measure two revisions, or two interpreters, against each other on this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer
from rich.cells import cell_len

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import (
    load_case_file,
    matches,
    near,
    unknown_glob,
)
from hpc_core.catalogue import ALL
from hpc_core.cli.console import say, say_json, tell
from hpc_core.cli.inputs import Files, parse_duration, parse_ratio
from hpc_core.compare.ab import Comparison, Plan, compare
from hpc_core.compare.arrange import Arranged, SideOptions, arrange, place_of
from hpc_core.compare.bench import Bench, Device
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.differences import Difference, Rule
from hpc_core.faults.catalogue import FAULTS
from hpc_core.gate.comparability import packages_moved
from hpc_core.gate.verdict import Verdict
from hpc_core.record import units as sizes
from hpc_core.record.environment import visible_gpus

Scale = Literal["tiny", "small", "full"]
_HEAD = ("case", "metric", "base", "head", "change", "interval", "verdict", "")
_RIGHT = {"base", "head", "change"}
_MISSING = "-"


def _chosen_cases(files: list[Path] | None, globs: Sequence[str], scale: Scale | None) -> tuple[Case, ...]:
    """Return the cases to compare: those of the files, or the built-in ones of a scale.

    Without a scale, the built-in ones are the full-size ones on a machine with a GPU, the tiny ones elsewhere.

    Raises:
        SpecError: a file that cannot be read, a glob that matches nothing, or no case left.
    """
    known = [case for path in files or [] for case in load_case_file(path)] if files else list(ALL)
    if duplicates := {case.id for case in known if [other.id for other in known].count(case.id) > 1}:
        raise SpecError(f"Two cases are called {min(duplicates)}. Give one of them another variant.")
    for glob in globs:
        if not any(matches(case.id, [glob]) for case in known):
            raise SpecError(unknown_glob(glob, [case.id for case in known]))
    if scale is None and not files and not globs:
        scale = "full" if visible_gpus() else "tiny"
    found = tuple(case for case in known if matches(case.id, globs) and scale in (None, case.scale))
    if not found:
        raise SpecError(
            f"No case is left: none of {len(known)} has scale {scale} and matches {', '.join(globs) or '*'}."
        )
    return found


def default_budget_s(cases: Sequence[Case]) -> float:
    """Return ten minutes; under three where all cases are tiny, for CI. Exact metrics are decided in the first minute."""
    return 170.0 if all(case.scale == "tiny" for case in cases) else 600.0


def _checked_fault(fault: str | None) -> str | None:
    """Return the fault's name.

    Raises:
        SpecError: there is no such fault.
    """
    if fault is not None and fault not in FAULTS:
        known = ", ".join(near(fault, FAULTS)) or f"one of {', '.join(FAULTS)}"
        raise SpecError(f"No fault is called {fault!r}. Near: {known}.")
    return fault


def ab(
    base: Annotated[str | None, typer.Argument(help="A revision: branch, tag or commit.")] = None,
    head: Annotated[
        str | None, typer.Argument(help="Another one; the working tree, uncommitted changes included, by default.")
    ] = None,
    base_python: Annotated[
        str | None, typer.Option("--base-python", help="Instead of a revision: base runs under this interpreter.")
    ] = None,
    head_python: Annotated[str | None, typer.Option("--head-python", help="The same for head.")] = None,
    files: Files = None,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Only these cases: a glob over full ids; repeatable.")
    ] = None,
    scale: Annotated[Scale | None, typer.Option(help="Which built-in cases; full with a GPU, else tiny.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="No pair starts that would end after this time: 10m by default, 170s if all cases are tiny."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="One process a side, exact metrics only: bytes, counts, FLOPs.")
    ] = False,
    wall: Annotated[str, typer.Option("--wall-tolerance", help="The allowed difference of wall time.")] = "5%",
    busy: Annotated[str, typer.Option("--busy-tolerance", help="The allowed difference of GPU-busy time.")] = "0.5%",
    paths: Annotated[
        list[str] | None,
        typer.Option("--path", help="A folder of the repository to import from, besides its top and src."),
    ] = None,
    device: Annotated[Device, typer.Option(help="The device to run on.")] = "auto",
    launch: Annotated[
        Literal["warm", "exec"],
        typer.Option(help="Fork workers from a process that has imported torch, or start each from scratch."),
    ] = "warm",
    everything: Annotated[bool, typer.Option("--all", help="Show every metric, not only what differs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON instead of a table.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 10 if something is undecided.")] = False,
    head_fault: Annotated[
        str | None,
        typer.Option("--head-fault", help="Self-check: inject this fault into head. Does the comparison see it?"),
    ] = None,
) -> None:
    """Measure two revisions, or two interpreters, in pairs of fresh processes. Exit code 1: worse, 11: a run broke."""
    began = time.monotonic()
    options = SideOptions(
        base=base,
        head=head,
        base_python=base_python,
        head_python=head_python,
        head_fault=_checked_fault(head_fault),
        paths=tuple(paths or ()),
    )
    rule = Rule(wall=parse_ratio("--wall-tolerance", wall), busy=parse_ratio("--busy-tolerance", busy))
    cases = _chosen_cases(files, case or [], scale)
    budget_s = default_budget_s(cases) if budget is None else parse_duration("--budget", budget)
    here = Path.cwd().resolve()
    place, in_git = place_of(here, needs_git=base is not None)
    with Checkouts(place if in_git else None) as checkouts:
        arranged = arrange(options, cases, checkouts, place, here, in_git)
        for line in _heading(arranged):
            (tell if as_json else say)(line)
        plan = Plan(cases=cases, rule=rule, budget_s=budget_s, exact_only=exact, refused=arranged.refused)
        with Bench(arranged.base, arranged.head, cases, way=launch, device=device) as bench:
            tell(
                f"{sizes.counted(len(cases), 'case')}{'; importing torch on both sides first' if launch == 'warm' else ''}"
            )
            bench.prepare()
            plan = msgspec.structs.replace(plan, spent_s=time.monotonic() - began)
            comparison = compare(plan, bench.run, tell, check=arranged.check)
            notes = bench.notes
    for note in dict.fromkeys(notes):
        tell(note)
    if as_json:
        say_json(_as_json(arranged, comparison), order=None)
    else:
        _show(comparison, everything=everything, seconds=time.monotonic() - began)
    raise typer.Exit(comparison.exit_code(strict=strict))


def _show(comparison: Comparison, *, everything: bool, seconds: float) -> None:
    say()
    for line in _lines(comparison, everything=everything):
        say(line)
    for line in _summary(comparison, seconds):
        say(line)


def _as_json(arranged: Arranged, comparison: Comparison) -> dict[str, Any]:
    sides = {
        name: {"label": side.label, "python": side.python, "commit": side.commit, "fault": side.fault}
        for name, side in (("base", arranged.base), ("head", arranged.head))
    }
    return {
        "sides": sides,
        "measured_by": arranged.measured_by,
        "notes": list(arranged.notes),
        "exit_code": comparison.exit_code(),
        "comparison": msgspec.to_builtins(comparison),
    }


def _heading(arranged: Arranged) -> list[str]:
    """Return both sides, and whose code measures."""
    return [f"base  {arranged.base.label}", f"head  {arranged.head.label}", arranged.measured_by, *arranged.notes]


def _value_text(value: float | None, unit: str) -> str:
    """Return a value, or a dash."""
    return _MISSING if value is None else sizes.quantity(value, unit.partition(" per ")[0])


def _interval_text(row: Difference) -> str:
    """Return where the change lies: "+8.1 … +12 %"."""
    if row.interval is None:
        return "exact" if row.noise == "exact" and row.verdict is not None else _MISSING
    low, high = (_rounded(bound).removesuffix(" %") for bound in row.interval)
    return f"{low} … {high} %"


def _rounded(ratio: float) -> str:
    """Return a ratio with the digits that noise allows: "+3.2 %", "+0.05 %", "+287 %"."""
    percent = ratio * 100
    decimals = 0 if abs(percent) >= 10 else 1 if abs(percent) >= 1 else 2
    return f"{percent:+,.{decimals}f} %"


def _change(row: Difference) -> str:
    if row.ratio is None or row.ratio == 0:
        return _MISSING if row.ratio is None else "="
    return sizes.percent(row.ratio) if row.noise == "exact" else _rounded(row.ratio)


def _cells(case: str, row: Difference) -> tuple[str, ...]:
    return (
        case,
        row.metric,
        _value_text(row.base, row.unit),
        _value_text(row.head, row.unit),
        _change(row),
        _interval_text(row),
        "" if row.verdict is None else row.verdict.value,
        row.reason,
    )


def _lines(comparison: Comparison, *, everything: bool) -> list[str]:
    """Return the table: what differs beyond noise and what gave no numbers; with `everything`, all metrics."""
    cells: list[tuple[str, ...]] = []
    for result in comparison.results:
        if result.error is not None:
            cells.append((result.case, "", "", "", "", "", result.error.upper(), result.reason))
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


def _summary(comparison: Comparison, seconds: float) -> list[str]:
    """Return how many metrics differ, which are undecided, the chance of a false alarm, what else changed between the sides, and how long it took."""
    rows = [(result.case, row) for result in comparison.results for row in result.rows if row.verdict is not None]
    counted = {verdict: sum(row.verdict is verdict for _, row in rows) for verdict in Verdict}
    counts = ", ".join(f"{number} {verdict.value}" for verdict, number in counted.items() if number)
    failed = [result for result in comparison.results if result.error is not None]
    text = [
        f"{sizes.counted(len(comparison.results), 'case')}, {len(rows)} metrics judged: {counts or 'none'}; {seconds:.0f} s"
    ]
    if failed:
        text[0] += f"; {sizes.counted(len(failed), 'case')} without numbers"
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
