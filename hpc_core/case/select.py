"""Select cases: load case files, match globs against ids, and suggest ids for a mistyped one."""

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
    """Run a Python file and return its list `CASES`.

    Raises:
        SpecError: the file is missing, raises, or its CASES is not a list of cases.
    """
    if not path.is_file():
        raise SpecError(f"{path}: no such case file. Give a Python file with a list CASES.")
    spec = importlib.util.spec_from_file_location(f"hpc_core_cases_{abs(hash(path.resolve()))}", path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path}: the name of a case file must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything; the message must name the file
        raise SpecError(f"{path}: running it raised {type(error).__name__}: {error}") from error
    return checked_cases(getattr(module, "CASES", None), str(path))


def checked_cases(found: object, where: str) -> tuple[Case, ...]:
    """Return the objects as cases.

    Raises:
        SpecError: they are not a list of cases, or two of them share an id.
    """
    if not isinstance(found, list | tuple) or not all(isinstance(case, Case) for case in found):
        raise SpecError(f"{where}: CASES must be a list of hpc_core.Case, got {type(found).__name__}.")
    ids = [case.id for case in found]
    twice = sorted({case_id for case_id in ids if ids.count(case_id) > 1})
    if twice:
        raise SpecError(f"{where}: two cases are called {twice[0]}. Give one of them another variant.")
    return tuple(found)


def matches(case_id: str, globs: Sequence[str]) -> bool:
    """Return whether one of the globs matches the whole id. Without globs every id matches."""
    return not globs or any(fnmatch.fnmatchcase(case_id, glob) for glob in globs)


def near(wrong: str, ids: Iterable[str]) -> list[str]:
    """Return the closest ids, closest first. If none is close, return those with the same variant or shape."""
    known = sorted(set(ids))
    close = difflib.get_close_matches(wrong, known, n=_NEAREST, cutoff=0.6)
    parts = {part.strip("*?") for part in wrong.split("/")} - {""}
    return close or [case_id for case_id in known if parts & set(case_id.split("/"))][:_NEAREST]


def unknown_glob(glob: str, ids: Iterable[str]) -> str:
    """Return a sentence about a glob that matches none of these ids, with the closest ones."""
    known = list(ids)
    close = near(glob, known)
    hint = f"Near: {', '.join(close)}." if close else "List the built-in ones: hpc-core cases."
    return f"{glob!r} matches none of {len(known)} cases; a glob is compared with the whole id. {hint}"
