"""Ask each side's own worker, before anything is measured, what it would run, and refuse sides that cannot be compared."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from hpc_core.case.case import Case, case_to_json
from hpc_core.case.errors import SpecError
from hpc_core.case.workloads import CallableSpec
from hpc_core.compare.ab import SideName
from hpc_core.compare.sides import Side
from hpc_core.launch.interpreter import worker_environment
from hpc_core.worker.describe import Description, KnownCase, Question, describe

KINDS = ("measure", "retime")
"""The kinds of job that a comparison sends."""
_LIMIT_S = 120
_TOO_OLD = ("No module named hpc_core.worker", "--job-fd")
"""Parts of the error of a worker without --describe: there is no worker, or its parser requires a job."""


def described(side: Side, cases: Sequence[Case], *, versions: Sequence[str] = ()) -> Description:
    """Ask a side what its workers would run. Takes a tenth of a second; imports no code under test.

    Raises:
        SpecError: the interpreter cannot run, or has no hpc_core that answers.
    """
    question = Question(
        cases=tuple(case_to_json(case).decode() for case in cases),
        packages=tuple(_packages(cases)),
        versions=tuple(versions),
    )
    who = f"{side.name}, {side.label}"
    try:
        ran = subprocess.run(
            (side.python, "-m", "hpc_core.worker", "--describe"),
            input=msgspec.json.encode(question),
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
            cwd=side.folder,
            env=os.environ | worker_environment(side.environment),
        )
        return msgspec.json.decode(ran.stdout, type=Description)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpecError(f"{who}: {side.python} cannot be asked what it would run: {error}.") from error
    except msgspec.MsgspecError as error:
        last = (ran.stderr.decode("utf-8", "replace").strip().splitlines() or ["it printed nothing"])[-1]
        if any(sign in last for sign in _TOO_OLD):
            raise SpecError(
                f"{who}: its hpc-core is too old to be compared with this one: its worker knows no --describe."
            ) from error
        raise SpecError(
            f"{who}: {side.python} cannot run hpc-core's workers: {last}. "
            "It needs hpc-core's dependencies, as pip install 'hpc-core[run]' brings them."
        ) from error


def check_protocol(side: Side, found: Description, fields: Sequence[str] = ()) -> None:
    """Refuse a side whose records this launcher would not understand, or that would not understand its jobs.

    Args:
        side: whose workers.
        found: their description.
        fields: fields of a job, besides its case and kind, that will be used.

    Raises:
        SpecError: another schema, records with unknown fields, or jobs without a kind or field that is used.
    """
    who, ours = f"{side.name}, {side.label}, has its own hpc-core", describe(Question())
    if found.schema != ours.schema:
        raise SpecError(
            f"{who} with schema {found.schema}; this one has {ours.schema}. "
            "Two revisions of hpc-core can be compared only where both have the same."
        )
    unknown = [
        f"{name}.{field}"
        for name, fields_found in found.record_fields.items()
        for field in fields_found
        if field not in ours.record_fields.get(name, ())
    ]
    if unknown:
        raise SpecError(
            f"{who}, whose records hold {', '.join(unknown[:4])}, unknown to this one ({ours.home}). "
            "Give the command from the newer of the two revisions."
        )
    lacking = sorted({*KINDS, *fields} - {*found.job_kinds, *found.job_fields})
    if lacking:
        raise SpecError(f"{who}, whose jobs have no {', '.join(lacking)}: it is too old to be compared with this one.")


def check_origin(side: Side, found: Description, cases: Sequence[Case]) -> None:
    """Refuse a revision whose steps would be imported from elsewhere: both sides would run the same code.

    Raises:
        SpecError: a package under test is not found, or lies outside the side's tree.
    """
    for name in _packages(cases):
        places = found.places.get(name, ())
        if places and all(Path(place).resolve().is_relative_to(side.root.resolve()) for place in places):
            continue
        where = f"would be imported from {places[0]}" if places else f"is not found by {Path(sys.executable).name}"
        raise SpecError(
            f"{side.name}, {side.label}: the code under test, {name}, {where}, not from this side's tree {side.root}. "
            "Both sides would run the same. Name the folder of the repository that holds it: --path DIR."
        )


def _packages(cases: Iterable[Case]) -> list[str]:
    """Return the packages that hold the steps of these cases; none for built-in cases."""
    factories = [case.workload.factory for case in cases if isinstance(case.workload, CallableSpec)]
    return sorted({factory.partition(":")[0].partition(".")[0] for factory in factories})


def check_comparable(
    base: Side, head: Side, cases: Sequence[Case], *, by_revision: bool
) -> tuple[str, dict[str, dict[SideName, str]]]:
    """Return a sentence that says whose code measures, and by case why a side cannot run it.

    Raises:
        SpecError: as `described`, `check_protocol` and `check_origin`.
    """
    sides: dict[SideName, Side] = {"base": base, "head": head}
    found = {name: described(side, cases) for name, side in sides.items()}
    refused: dict[str, dict[SideName, str]] = {}
    for name, side in sides.items():
        check_protocol(side, found[name], fields=("fault",) if side.fault else ())
        if by_revision:
            check_origin(side, found[name], cases)
        for case, known in zip(cases, found[name].cases, strict=True):
            if known.digest != case.digest:
                refused.setdefault(case.id, {})[name] = _why_refused(known)
    return _measured_by(sides, found), refused


def _why_refused(known: KnownCase) -> str:
    if known.error:
        return f"does not know this case: {known.error}"
    return f"has another case of this name (digest {known.digest})."


def _measured_by(sides: dict[SideName, Side], found: dict[SideName, Description]) -> str:
    own = [Path(found[name].home).is_relative_to(side.root.resolve()) for name, side in sides.items()]
    if all(own) and sides["base"].root != sides["head"].root:
        return "Measured by each side's own hpc-core: it is the code under test, and both have one protocol."
    if found["base"].home != found["head"].home:
        raise SpecError(
            f"base would be measured by {found['base'].home}, head by {found['head'].home}: a difference could come from either. "
            "Only in hpc-core's own repository may each side bring its own."
        )
    return "Measured by one hpc-core on both sides."
