"""Ask a side's own worker, before anything is measured, what it would run; refuse sides that cannot be compared."""

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
from hpc_core.compare.environments import Side
from hpc_core.launch.interpreter import worker_environment
from hpc_core.worker.describe import Description, Question, describe

_LIMIT_S = 120
_TOO_OLD = ("No module named hpc_core.worker", "--job-fd")
"""How a worker fails that knows no --describe: there is none, or its parser insists on a job."""


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


def check_protocol(side: Side, found: Description, *, kinds: Sequence[str], fields: Sequence[str] = ()) -> None:
    """Refuse a side whose workers this launcher could not understand, or that would not understand its jobs.

    Args:
        side: whose workers.
        found: what they said.
        kinds: kinds of job that will be used.
        fields: fields of a job, besides its case and kind, that will be used.

    Raises:
        SpecError: another schema, records with fields that are unknown here, or jobs without a kind or field that is used.
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
    lacking = sorted({*kinds, *fields} - {*found.job_kinds, *found.job_fields})
    if lacking:
        raise SpecError(f"{who}, whose jobs have no {', '.join(lacking)}: it is too old to be compared with this one.")


def check_origin(side: Side, found: Description, cases: Sequence[Case]) -> None:
    """Refuse a side of a revision whose steps would come from elsewhere: both sides would run the same code.

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
    """Return the packages that hold the steps of these cases; none for cases of the catalogue."""
    factories = [case.workload.factory for case in cases if isinstance(case.workload, CallableSpec)]
    return sorted({factory.partition(":")[0].partition(".")[0] for factory in factories})
