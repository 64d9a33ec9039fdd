"""`hpc-core bisect`: which commit, or which version of a package, first moved a metric."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.cli.ab import Device, duration_s, ratio_said
from hpc_core.cli.console import say, tell
from hpc_core.cli.known import Files, known_case
from hpc_core.compare.arrange import place_of
from hpc_core.compare.bench import Bench
from hpc_core.compare.bisect import Answer, Found, Question, search
from hpc_core.compare.candidates import Candidates, Commits, Versions, versions_said
from hpc_core.compare.checkouts import Checkouts
from hpc_core.compare.differences import Rule
from hpc_core.gate.exit_code import ExitCode

__all__ = ["bisect"]


def bisect(
    case: Annotated[str, typer.Argument(help="A whole id, such as tiny/lora.")],
    metric: Annotated[str, typer.Argument(help="Such as peak_bytes; exact ones take one process a side.")],
    ends: Annotated[
        str | None, typer.Argument(metavar="GOOD..BAD", help="Two revisions, or with --package two versions.")
    ] = None,
    package: Annotated[str | None, typer.Option(help="Bisect over versions of this package, not over commits.")] = None,
    versions: Annotated[str | None, typer.Option(help="Its versions, the good end first: 5.17,5.20,5.23,5.24.")] = None,
    python_for: Annotated[
        list[str] | None,
        typer.Option(
            "--python-for", help="VERSION=PATH of an interpreter that has it; else pip makes one for the time."
        ),
    ] = None,
    files: Files = None,
    wall: Annotated[str, typer.Option("--wall-tolerance", help="Good and bad must differ by more.")] = "10%",
    busy: Annotated[str, typer.Option("--busy-tolerance", help="The same for GPU-busy time.")] = "0.5%",
    budget: Annotated[str, typer.Option(help="No step is begun after it.")] = "2h",
    paths: Annotated[
        list[str] | None,
        typer.Option("--path", help="A folder of the repository to import from, beside its top and src."),
    ] = None,
    device: Annotated[Device, typer.Option(help="Where it runs.")] = "auto",
    launch: Annotated[Literal["warm", "exec"], typer.Option(help="As for ab.")] = "warm",
    as_json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Find the first bad commit or version by binary search. Exit code 0: found, 10: only narrowed down."""
    chosen = known_case(case, files)
    rule = Rule(wall=ratio_said("--wall-tolerance", wall), busy=ratio_said("--busy-tolerance", busy))
    deadline = time.monotonic() + duration_s("--budget", budget)
    if package is None and (versions is not None or python_for):
        raise SpecError("--versions and --python-for are for versions of one package: say which, with --package.")
    if package is None and ends is None:
        raise SpecError("Nothing to bisect: say GOOD..BAD, or --package with --versions.")
    said = versions_said(versions, ends, python_for or []) if package is not None else None
    here = Path.cwd().resolve()
    place, in_git = place_of(here, needs_git=package is None)
    with Checkouts(place if in_git else None) as checkouts:
        candidates: Candidates
        if package is not None and said is not None:
            candidates = Versions(
                package, said.versions, said.pythons, chosen, checkouts, place=place, here=here, tell=tell
            )
        else:
            candidates = Commits(ends or "", chosen, checkouts, place, here, paths or [])
        for note in candidates.notes:
            tell(note)
        found, first = _searched(candidates, chosen, metric, rule, launch, device, deadline)
    _show(candidates, found, first, metric, as_json=as_json)
    raise typer.Exit(ExitCode.NOT_COMPARABLE if found.suspects else ExitCode.OK)


def _searched(
    candidates: Candidates,
    case: Case,
    metric: str,
    rule: Rule,
    launch: Literal["warm", "exec"],
    device: Device,
    deadline: float,
) -> tuple[Found, Answer]:
    """The end of the search, and what the bad end said."""
    last = len(candidates.labels) - 1
    good, bad = candidates.good, candidates.side(last)
    with Bench(good, bad, [case], way=launch, device=device) as bench:
        tell(f"good {good.label}, bad {bad.label}, {last} between; importing torch on both sides first")
        bench.prepare()
        question = Question(case, metric, rule, bench.run)
        first = question.ends(good.label, bad.label)
        tell(f"they differ: {first.text}")

        def classify(index: int) -> Answer:
            if time.monotonic() > deadline:
                return Answer(word="skip", text="the time budget is over; raise --budget")
            try:
                bench.replace_head(candidates.side(index))
                answer = question.ask()
            except SpecError as error:
                answer = Answer(word="skip", text=str(error))
            tell(f"{answer.word:<4} {candidates.labels[index]}: {answer.text}")
            return answer

        return search(last + 1, classify), first


def _show(candidates: Candidates, found: Found, ends: Answer, metric: str, *, as_json: bool) -> None:
    at = next((step.answer for step in found.steps if step.index == found.first), ends)
    suspects = found.suspects
    before = next((step.answer for step in found.steps if step.index == min(suspects, default=found.first) - 1), None)
    if as_json:
        content: dict[str, Any] = {
            "metric": metric,
            "first_bad": list(candidates.described(found.first)),
            "before": at.base if before is None else before.head,
            "after": at.head,
            "suspects": [candidates.labels[index] for index in suspects],
            "steps": [
                {"candidate": candidates.labels[step.index], **msgspec.to_builtins(step.answer)} for step in found.steps
            ],
        }
        say(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())
        return
    head, *more = candidates.described(found.first)
    say(f"First bad: {head}" if not suspects else f"Bad for certain: {head}")
    for line in more:
        say(f"  {line}")
    say(f"  against the good end: {at.text}")
    if before is not None:
        say(f"  the one before it:    {before.text}")
    if suspects:
        say(f"{len(suspects)} before it gave no answer, and any of them may be the first:")
        for index in suspects:
            reason = next((step.answer.text for step in found.steps if step.index == index), "not tried")
            say(f"  {candidates.labels[index]}: {reason}")
