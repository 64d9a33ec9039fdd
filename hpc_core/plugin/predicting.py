"""Tests that predict: the decorator that marks them, what they are predicted for, and which of them take part."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, Literal

import pytest

from hpc_core.case.case import Case
from hpc_core.case.select import checked_cases
from hpc_core.record.gpus import DEFAULT, gpu_named

__all__ = ["MARK", "Extent", "predicted_cases", "predicted_gpu", "takes_part"]

MARK = "perf_predicted"
Extent = Literal["short", "all", "off"]
"""How many predictions a run makes: those called short, all of them, or none."""


def predicted_cases(
    cases: Iterable[Case], *, gpu: str = DEFAULT, short: Collection[str] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Parametrize a test over its argument `case`, and predict each for `gpu` instead of running it.

    Args:
        cases: of generation and fine-tuning; no GPU is needed for any of them.
        gpu: a name from `hpc_core.record.gpus`, or a part of one.
        short: ids of those that also run without `--perf-predict all`.

    Raises:
        PredictError: no kind of GPU has this name.
        SpecError: something is no case, two share an id, or `short` names a case that is not there.
    """
    checked = checked_cases(list(cases), "predicted_cases")
    unknown = sorted(set(short) - {case.id for case in checked})
    if unknown:
        from hpc_core.case.errors import SpecError

        raise SpecError(f"predicted_cases(short=…) names no case of its list: {', '.join(unknown)}.")
    name = gpu_named(gpu).name
    parameters = [
        pytest.param(case, id=case.id, marks=(getattr(pytest.mark, MARK)(gpu=name, short=case.id in short),))
        for case in checked
    ]
    decorate: Callable[[Callable[..., Any]], Callable[..., Any]] = pytest.mark.parametrize("case", parameters)
    return decorate


def predicted_gpu(item: pytest.Item) -> str | None:
    """The GPU that a test's case is predicted for; None for a test that runs its case."""
    mark = item.get_closest_marker(MARK)
    return None if mark is None else str(mark.kwargs["gpu"])


def takes_part(item: pytest.Item, extent: Extent) -> bool:
    """Whether a prediction is among those that were asked for."""
    mark = item.get_closest_marker(MARK)
    return mark is not None and (extent == "all" or (extent == "short" and bool(mark.kwargs["short"])))
