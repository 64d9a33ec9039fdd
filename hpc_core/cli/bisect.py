"""`hpc-core bisect`: find the version of a package that first changed a metric.

Commits are searched by git: `git bisect run pytest --benchmark --perf-bisect --case CASE`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from hpc_core.case.case import Case
from hpc_core.case.errors import HpcCoreError, SpecError
from hpc_core.cli.console import say, say_json, tell
from hpc_core.cli.inputs import Files, known_case, parse_duration, parse_ratio
from hpc_core.compare.arrange import place_of
from hpc_core.compare.bench import Bench, Device
from hpc_core.compare.bisect import Answer, Found, Question, search
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.differences import Rule
from hpc_core.compare.versions import Versions, VersionSides
from hpc_core.gate.exit_code import ExitCode


def bisect(
    case: Annotated[str, typer.Argument(help="A full id, such as tiny/lora.")],
    metric: Annotated[
        str, typer.Argument(help="A metric, such as peak_bytes. Exact metrics need one process per side.")
    ],
    ends: Annotated[str | None, typer.Argument(metavar="GOOD..BAD", help="Two versions.")] = None,
    package: Annotated[str | None, typer.Option(help="The package whose versions are searched.")] = None,
    versions: Annotated[str | None, typer.Option(help="The versions, the good one first: 5.17,5.20,5.23,5.24.")] = None,
    python_for: Annotated[
        list[str] | None,
        typer.Option(
            "--python-for",
            help="VERSION=PATH of an interpreter that has it; otherwise pip makes a temporary environment.",
        ),
    ] = None,
    files: Files = None,
    wall: Annotated[
        str, typer.Option("--wall-tolerance", help="The least difference of wall time between good and bad.")
    ] = "10%",
    busy: Annotated[str, typer.Option("--busy-tolerance", help="The same for GPU-busy time.")] = "0.5%",
    budget: Annotated[str, typer.Option(help="The time after which no step starts.")] = "2h",
    device: Annotated[Device, typer.Option(help="The device to run on.")] = "auto",
    launch: Annotated[Literal["warm", "exec"], typer.Option(help="As for ab.")] = "warm",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the first bad version of a package by binary search. Exit code 0: found, 10: only narrowed down."""
    if package is None:
        raise SpecError(
            f"Name a package with --package. To search commits, use git: git bisect start BAD GOOD, "
            f"then git bisect run pytest --benchmark --perf-bisect --case {case}"
        )
    chosen = known_case(case, files)
    rule = Rule(wall=parse_ratio("--wall-tolerance", wall), busy=parse_ratio("--busy-tolerance", busy))
    deadline = time.monotonic() + parse_duration("--budget", budget)
    named = Versions.parse(package, versions, ends, python_for or [])
    here = Path.cwd().resolve()
    place, _ = place_of(here, needs_git=False)
    with Checkouts(None) as temporary:
        sides = VersionSides(named, chosen, temporary.folder, place=place, here=here, tell=tell)
        found, first = _searched(named, sides, chosen, metric, rule, launch, device, deadline)
    _show(named, found, first, metric, as_json=as_json)
    raise typer.Exit(ExitCode.NOT_COMPARABLE if found.suspects else ExitCode.OK)


def _searched(
    named: Versions,
    sides: VersionSides,
    case: Case,
    metric: str,
    rule: Rule,
    launch: Literal["warm", "exec"],
    device: Device,
    deadline: float,
) -> tuple[Found, Answer]:
    """Return the result of the search, and the answer for the bad end."""
    last = len(named.labels) - 1
    good, bad = sides.good, sides.candidate(last)
    with Bench(good, bad, [case], way=launch, device=device) as bench:
        tell(f"good {good.label}, bad {bad.label}, {last} between; importing torch on both sides first")
        bench.prepare()
        question = Question(case, metric, rule, bench.run)
        first = question.ends(good.label, bad.label)
        tell(f"they differ: {first.text}")

        def classify(index: int) -> Answer:
            if time.monotonic() > deadline:
                return Answer(word="skip", text="the time budget is spent; raise --budget")
            try:
                bench.replace_head(sides.candidate(index))
                answer = question.ask()
            except HpcCoreError as error:
                answer = Answer(word="skip", text=str(error))
            tell(f"{answer.word:<4} {named.labels[index]}: {answer.text}")
            return answer

        return search(last + 1, classify), first


def _show(named: Versions, found: Found, ends: Answer, metric: str, *, as_json: bool) -> None:
    at = next((step.answer for step in found.steps if step.index == found.first), ends)
    suspects = found.suspects
    before = next((step.answer for step in found.steps if step.index == min(suspects, default=found.first) - 1), None)
    label, previous = named.labels[found.first], named.versions[found.first]
    if as_json:
        content: dict[str, Any] = {
            "metric": metric,
            "first_bad": [f"{label} (the one before it in the list is {previous})"],
            "before": at.base if before is None else before.head,
            "after": at.head,
            "suspects": [named.labels[index] for index in suspects],
            "steps": [
                {"candidate": named.labels[step.index], **msgspec.to_builtins(step.answer)} for step in found.steps
            ],
        }
        say_json(content, order=None)
        return
    say(f"{'Known to be bad' if suspects else 'First bad'}: {label} (the one before it in the list is {previous})")
    say(f"  against the good end: {at.text}")
    if before is not None:
        say(f"  the one before it:    {before.text}")
    if suspects:
        say(f"{len(suspects)} before it gave no answer, and any of them may be the first:")
        for index in suspects:
            reason = next((step.answer.text for step in found.steps if step.index == index), "not tried")
            say(f"  {named.labels[index]}: {reason}")
