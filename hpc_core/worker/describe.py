"""Describe what a worker of this tree would run: `python -m hpc_core.worker --describe` reads a Question and prints a Description, both JSON.

An A/B queries each side's own worker before it measures. The sides may be different revisions of hpc-core, so the output has everything
that a launcher must know of the other revision, without importing its modules. Imports no torch and no code under test.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from typing import Any, get_args

import msgspec

from hpc_core.case.case import SCHEMA, case_from_json
from hpc_core.record.job import Job, Kind
from hpc_core.record.record import Record
from hpc_core.record.version import PACKAGE_FOLDER


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What to describe."""

    cases: tuple[str, ...] = ()
    """Cases as JSON."""
    packages: tuple[str, ...] = ()
    """Packages that hold code under test."""
    versions: tuple[str, ...] = ()
    """Distributions whose version is wanted."""


class KnownCase(msgspec.Struct, frozen=True, kw_only=True):
    """How this worker reads a case."""

    digest: str = ""
    error: str = ""
    """Why it cannot be read; empty if it can."""


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """The description of a worker."""

    home: str
    """Folder of the hpc_core that it imports."""
    schema: int
    record_fields: dict[str, tuple[str, ...]]
    """Fields of every structure that a record is made of."""
    job_fields: tuple[str, ...]
    job_kinds: tuple[str, ...]
    cases: tuple[KnownCase, ...] = ()
    """In the order of the question."""
    places: dict[str, tuple[str, ...]] = {}
    """Where each package would be imported from; empty if it is not found."""
    versions: dict[str, str] = {}
    """The version of each distribution; empty if it is not installed."""


def describe(question: Question) -> Description:
    """Describe what a worker in this process would run."""
    structures: dict[str, Any] = msgspec.json.schema(Record).get("$defs", {})
    return Description(
        home=str(PACKAGE_FOLDER),
        schema=SCHEMA,
        record_fields={name: tuple(sorted(part.get("properties", {}))) for name, part in structures.items()},
        job_fields=Job.__struct_fields__,
        job_kinds=tuple(str(kind.__struct_config__.tag) for kind in get_args(Kind)),
        cases=tuple(map(_known, question.cases)),
        places={name: _places(name) for name in question.packages},
        versions={name: _version(name) for name in question.versions},
    )


def main() -> None:
    """Answer the question on stdin."""
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(describe(question)))


def _known(text: str) -> KnownCase:
    try:
        return KnownCase(digest=case_from_json(text).digest)
    except ValueError as error:  # SpecError, and what msgspec raises
        return KnownCase(error=str(error))


def _places(package: str) -> tuple[str, ...]:
    found = importlib.util.find_spec(package)
    return () if found is None else tuple(found.submodule_search_locations or [found.origin or ""])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""
