"""Asking a side, before anything is measured, what its workers would run: whose hpc_core, whose code, which cases it knows.

Two sides that would silently run the same code, or that do not speak the same protocol, are refused here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hpc_core.case.case import (
    SCHEMA,
    CallableSpec,
    Case,
    case_to_json,
)
from hpc_core.case.errors import SpecError
from hpc_core.compare.side import Side
from hpc_core.record.job import Job
from hpc_core.record.record import Record

__all__ = ["Told", "check_origin", "check_protocol", "packages_of", "probe", "spoken"]

_LIMIT_S = 120
_ASK = """
import importlib.metadata, importlib.util, json, os, sys
asked = json.load(sys.stdin)
import msgspec
import hpc_core
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.case.case import SCHEMA, case_from_json

def spoken(kind):
    found = msgspec.json.schema(kind).get("$defs", {})
    return {name: sorted(part.get("properties", {})) for name, part in found.items()}

def digest(text):
    try:
        return case_from_json(text).digest
    except Exception as error:  # runs in the other side's tree, whose own errors are of any kind; told as why it does not know the case
        return "! " + str(error)

def places(name):
    found = importlib.util.find_spec(name)
    if found is None:
        return []
    return list(found.submodule_search_locations or [found.origin or ""])

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""

json.dump({
    "measuring": os.path.dirname(os.path.abspath(hpc_core.__file__)),
    "schema": SCHEMA,
    "record": spoken(Record),
    "job": spoken(Job),
    "digests": [digest(text) for text in asked["cases"]],
    "places": {name: places(name) for name in asked["packages"]},
    "versions": {name: version(name) for name in asked["versions"]},
}, sys.stdout)
"""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What a side said of itself."""

    measuring: str
    """Folder of the hpc_core that its workers import."""
    schema: int
    record: dict[str, list[str]]
    """Fields of everything a record is made of."""
    job: dict[str, list[str]]
    digests: list[str]
    """Of the cases asked for, in order; "! …" where it cannot read one."""
    places: dict[str, list[str]]
    """Where each package under test would be imported from."""
    versions: dict[str, str]


def spoken(kind: type) -> dict[str, list[str]]:
    """Fields by structure of what travels as this type."""
    found: Mapping[str, Any] = msgspec.json.schema(kind).get("$defs", {})
    return {name: sorted(part.get("properties", {})) for name, part in found.items()}


def packages_of(cases: Iterable[Case]) -> list[str]:
    """The packages that hold the steps of these cases; none for cases of the catalogue."""
    factories = [case.workload.factory for case in cases if isinstance(case.workload, CallableSpec)]
    return sorted({factory.partition(":")[0].partition(".")[0] for factory in factories})


def probe(side: Side, cases: Sequence[Case], *, versions: Sequence[str] = ()) -> Told:
    """Ask a side what its workers would run. Takes a tenth of a second; imports no code under test.

    Raises:
        SpecError: the interpreter cannot run, or has no hpc_core that can be asked.
    """
    question = {
        "cases": [case_to_json(case).decode() for case in cases],
        "packages": packages_of(cases),
        "versions": list(versions),
    }
    try:
        ran = subprocess.run(
            (side.python, "-c", _ASK),
            input=msgspec.json.encode(question),
            capture_output=True,
            timeout=_LIMIT_S,
            check=False,
            cwd=side.folder,
            env=os.environ | _with_installed(side.environment),
        )
        return msgspec.json.decode(ran.stdout, type=Told)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpecError(f"{side.name}, {side.label}: {side.python} cannot be asked: {error}.") from error
    except msgspec.MsgspecError as error:
        last = (ran.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"])[-1]
        raise SpecError(
            f"{side.name}, {side.label}: {side.python} cannot run hpc-core's workers: {last}. "
            "It needs hpc-core's dependencies, as pip install 'hpc-core[run]' brings them, and a revision of hpc-core "
            "must be new enough to have the same parts."
        ) from error


def _with_installed(environment: dict[str, str]) -> dict[str, str]:
    from hpc_core.launch.interpreter import worker_environment

    return worker_environment(environment)


def check_protocol(side: Side, told: Told, *, uses: Sequence[str] = ()) -> None:
    """Refuse a side whose workers this launcher could not understand, or that would not understand its jobs.

    Args:
        side: whose workers.
        told: what it said.
        uses: kinds of job, and fields of a job beyond its case, that will be used.

    Raises:
        SpecError: another schema, records with fields that are unknown here, or jobs without a kind or field that is used.
    """
    if told.schema != SCHEMA:
        raise SpecError(
            f"{side.name}, {side.label}, has its own hpc-core with schema {told.schema}; this one speaks {SCHEMA}. "
            "Two revisions of hpc-core can be compared only where both speak the same."
        )
    ours = spoken(Record)
    unknown = [
        f"{name}.{field}"
        for name, fields in told.record.items()
        for field in sorted(set(fields) - set(ours.get(name, [])))
    ]
    if unknown:
        raise SpecError(
            f"{side.name}, {side.label}, has its own hpc-core, whose records hold {', '.join(unknown[:4])}, unknown to this one "
            f"({Path(__file__).parent.parent}). Give the command from the newer of the two revisions."
        )
    lacking = sorted(set(uses) - {*told.job, *told.job.get(Job.__name__, [])})
    if lacking:
        raise SpecError(f"{side.name}, {side.label}, has its own hpc-core, whose jobs know no {', '.join(lacking)}.")


def check_origin(side: Side, told: Told, cases: Sequence[Case]) -> None:
    """Refuse a side of a revision whose steps would come from elsewhere: both sides would run the same code.

    Raises:
        SpecError: a package under test is not found, or lies outside the side's tree.
    """
    for name in packages_of(cases):
        places = told.places.get(name, [])
        if places and all(Path(place).resolve().is_relative_to(side.root.resolve()) for place in places):
            continue
        where = f"would be imported from {places[0]}" if places else f"is not found by {Path(sys.executable).name}"
        raise SpecError(
            f"{side.name}, {side.label}: the code under test, {name}, {where}, not from this side's tree {side.root}. "
            "Both sides would run the same. Name the folder of the repository that holds it: --path DIR."
        )
