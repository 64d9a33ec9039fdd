"""Choosing cases: a user's own case files, globs over whole ids, and what a mistyped id was meant to be.

Knows cases and files. Runs a case file as Python, and nothing else.
"""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError

_NEAREST = 4


def load_case_file(path: Path) -> tuple[Case, ...]:
    """The list `CASES` of a Python file.

    Raises:
        SpecError: there is no such file, it cannot be run, or its CASES is no list of cases.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such case file. It is a Python file with a list CASES.")
    spec = importlib.util.spec_from_file_location(f"hpc_core_cases_{abs(hash(path.resolve()))}", path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path}: a case file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything; the message must name the file
        raise SpecError(f"{path}: cannot be run: {type(error).__name__}: {error}") from error
    return checked_cases(getattr(module, "CASES", None), str(path))


def checked_cases(found: object, where: str) -> tuple[Case, ...]:
    """These objects, if they are cases with ids of their own.

    Raises:
        SpecError: they are not.
    """
    if not isinstance(found, list | tuple) or not all(isinstance(case, Case) for case in found):
        raise SpecError(f"{where}: CASES must be a list of hpc_core.Case, got {type(found).__name__}.")
    ids = [case.id for case in found]
    twice = sorted({case_id for case_id in ids if ids.count(case_id) > 1})
    if twice:
        raise SpecError(f"{where}: two cases are called {twice[0]}. Give one of them another variant.")
    return tuple(found)


def matches(case_id: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs matches the whole id; without a glob every id is chosen."""
    return not globs or any(fnmatch.fnmatchcase(case_id, glob) for glob in globs)


def near(wrong: str, ids: Iterable[str]) -> list[str]:
    """The ids that come closest, the closest first; those with the same variant or shape where none is close."""
    known = sorted(set(ids))
    close = difflib.get_close_matches(wrong, known, n=_NEAREST, cutoff=0.6)
    parts = {part.strip("*?") for part in wrong.split("/")} - {""}
    return close or [case_id for case_id in known if parts & set(case_id.split("/"))][:_NEAREST]


def unknown_glob(glob: str, ids: Iterable[str]) -> str:
    """One line on a glob that matches none of these ids: how many there are, and what was probably meant."""
    known = list(ids)
    close = near(glob, known)
    hint = f"Near: {', '.join(close)}." if close else "List the built-in ones: hpc-core cases."
    return f"{glob!r} matches none of {len(known)} cases; a glob is compared with the whole id. {hint}"
