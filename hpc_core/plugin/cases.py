"""Cases as parametrized tests, and tests as cases: the decorator, the case of a test item, and ids made from names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from hpc_core.case.case import Case
from hpc_core.case.select import checked_cases

__all__ = ["CaseFile", "case_id_of", "case_of", "perf_cases"]

_NOT_IN_AN_ID = re.compile(r"[^a-z0-9.+_]+")


def perf_cases(cases: Iterable[Case]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Parametrize a test over its argument `case`: one test a case, called by its id, marked `gpu` if it needs one.

    Raises:
        SpecError: something is no case, or two share an id.
    """
    checked = checked_cases(list(cases), "perf_cases")
    parameters = [
        pytest.param(case, id=case.id, marks=(pytest.mark.gpu,) if case.needs_gpu else ()) for case in checked
    ]
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize("case", parameters)
    return decorate


def case_of(item: pytest.Item) -> Case | None:
    """The case that a test is parametrized with."""
    callspec = getattr(item, "callspec", None)
    values = () if callspec is None else callspec.params.values()
    return next((value for value in values if isinstance(value, Case)), None)


def case_id_of(item: pytest.Item) -> str:
    """The id of a test's case: the parametrized one, or `<module>/<test>` for a test that brings a step of its own."""
    case = case_of(item)
    if case is not None:
        return case.id
    return f"{_plain(item.path.stem)}/{_plain(item.name)}"


def _plain(name: str) -> str:
    return _NOT_IN_AN_ID.sub("-", name.lower()).strip("-._+") or "unnamed"


class CaseFile(pytest.Module):
    """A user's file with a list CASES, collected as a test module with one test a case."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """The file's own tests, and one for each of its cases."""

        @perf_cases(self.obj.CASES)
        def test_case(case: Case, perf: Callable[[Case], Any]) -> None:
            perf(case)

        self.obj.test_case = test_case
        return super().collect()
