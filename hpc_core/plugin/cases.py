"""Cases as parametrized tests: the two decorators, and the case, id and GPU of a test item."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Container, Iterable
from typing import Any, Literal

import pytest

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import checked_cases
from hpc_core.record.gpus import DEFAULT, gpu_named

MARK = "perf_predicted"
Extent = Literal["short", "all", "off"]
"""Which predictions a run makes: the short set, all of them, or none."""
_NOT_IN_AN_ID = re.compile(r"[^a-z0-9.+_]+")


def perf_cases(
    cases: Iterable[Case], *, on_request: Container[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Parametrize a test over its argument `case`: one test per case, named by its id and marked `perf_gpu` if it needs a GPU.

    Cases whose ids are in `on_request` are marked `perf_on_request`: a run leaves them out unless it is told otherwise.

    Raises:
        SpecError: an element is not a case, or two cases share an id.
    """
    checked = checked_cases(list(cases), "perf_cases")
    parameters = [pytest.param(case, id=case.id, marks=_marks(case, on_request)) for case in checked]
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize("case", parameters)
    return decorate


def _marks(case: Case, on_request: Container[str]) -> list[pytest.MarkDecorator]:
    marks = [(pytest.mark.perf_gpu, case.needs_gpu), (pytest.mark.perf_on_request, case.id in on_request)]
    return [mark for mark, applies in marks if applies]


def case_of(item: pytest.Item) -> Case | None:
    """Return the case that a test is parametrized with, or None."""
    callspec = getattr(item, "callspec", None)
    values = () if callspec is None else callspec.params.values()
    return next((value for value in values if isinstance(value, Case)), None)


def case_id_of(item: pytest.Item) -> str:
    """Return the id of a test's case; `<module>/<test>` for a test with a step of its own."""
    case = case_of(item)
    if case is not None:
        return case.id
    return f"{_plain(item.path.stem)}/{_plain(item.name)}"


def _plain(name: str) -> str:
    return _NOT_IN_AN_ID.sub("-", name.lower()).strip("-._+") or "unnamed"


class CaseFile(pytest.Module):
    """A user's file with a list CASES, collected as a test module with one test per case."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """Collect the file's own tests, and one test for each of its cases."""

        @perf_cases(self.obj.CASES)
        def test_case(case: Case, perf: Callable[[Case], Any]) -> None:
            perf(case)

        self.obj.test_case = test_case
        return super().collect()


def predicted_cases(
    cases: Iterable[Case], *, gpu: str = DEFAULT, short: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Parametrize a test over its argument `case`, and predict each case for `gpu` instead of running it.

    Args:
        cases: generation and fine-tuning. None of them needs a GPU.
        gpu: a name from `hpc_core.record.gpus`, or an unambiguous part of one.
        short: ids of the cases in the short set, which run without `--perf-predict all`.

    Raises:
        PredictError: no GPU, or more than one, has this name.
        SpecError: an element is not a case, two cases share an id, or `short` names a case that is not in the list.
    """
    checked = checked_cases(list(cases), "predicted_cases")
    unknown = sorted(set(short) - {case.id for case in checked})
    if unknown:
        raise SpecError(f"predicted_cases(short=…) names no case of its list: {', '.join(unknown)}.")
    name = gpu_named(gpu).name
    parameters = [
        pytest.param(case, id=case.id, marks=(getattr(pytest.mark, MARK)(gpu=name, short=case.id in short),))
        for case in checked
    ]
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize("case", parameters)
    return decorate


def predicted_gpu(item: pytest.Item) -> str | None:
    """Return the GPU that a test's case is predicted for; None for a test that runs its case."""
    mark = item.get_closest_marker(MARK)
    return None if mark is None else str(mark.kwargs["gpu"])


def takes_part(item: pytest.Item, extent: Extent) -> bool:
    """Return whether a prediction belongs to the set that this run makes."""
    mark = item.get_closest_marker(MARK)
    return mark is not None and (extent == "all" or (extent == "short" and bool(mark.kwargs["short"])))
