"""Which cases the command line knows, and finding one by its id."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import load_case_file, near
from hpc_core.catalogue import (
    ALL,
    DATA,
    INT4,
    SWEEP,
    TINY_DATA,
    TRIAL,
)
from hpc_core.catalogue.predicted import PREDICTED

__all__ = ["Files", "known_case", "known_cases", "suite_cases"]

Files = Annotated[list[Path] | None, typer.Option("--cases", help="A Python file whose CASES count too; repeatable.")]


def suite_cases(files: list[Path] | None) -> dict[str, Case]:
    """What runs where nobody names a case: the suite's and those of these files, by id.

    Raises:
        SpecError: a file that is none, or holds no cases.
    """
    return {case.id: case for case in [*ALL, *_own(files)]}


def known_cases(files: list[Path] | None) -> dict[str, Case]:
    """Whatever can be named: the catalogue's cases and those of these files, by id.

    Raises:
        SpecError: a file that is none, or holds no cases.
    """
    own = _own(files)
    return {case.id: case for case in [*ALL, *TRIAL, *SWEEP, *DATA, *TINY_DATA, *INT4, *PREDICTED, *own]}


def _own(files: list[Path] | None) -> list[Case]:
    return [case for path in files or [] for case in load_case_file(path)]


def known_case(case_id: str, files: list[Path] | None) -> Case:
    """The case of this id.

    Raises:
        SpecError: there is none; the message names those that are near.
    """
    known = known_cases(files)
    if case_id not in known:
        close = ", ".join(near(case_id, known)) or "none; see hpc-core cases"
        raise SpecError(f"no case is called {case_id!r}. Near: {close}.")
    return known[case_id]
