"""Cases as parametrized tests: the two decorators, and the case, id and GPU of a test item."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Container, Iterable
from pathlib import Path
from typing import Any, Literal

import pytest

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.select import checked_cases
from hpc_core.record.gpus import DEFAULT, gpu_named

MARK = "perf_predicted"
Extent = Literal["short", "all", "off"]
"""Which predictions a run makes: the short set, all of them, or none."""
_TELLING = pytest.StashKey[str]()
"""What tells apart two tests, or two classes, whose names differ only in what an id cannot hold."""
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


def root_of(config: pytest.Config) -> Path:
    """Return the folder that ids, baselines and settings are relative to: pytest's root folder, or without an ini file where it was called.

    pytest chooses its root folder before it knows our options: without an ini file, the value of `--perf-records DIR` would move it.
    """
    called: Path = config.invocation_params.dir
    return called if config.inipath is None and called.is_relative_to(config.rootpath) else config.rootpath


def case_id_of(item: pytest.Item) -> str:
    """Return the id of a test's case; for a test with a step of its own `<folders>.<module>/<classes>.<test>`.

    Folders are those below the folder of `perf_paths` that holds the file, or below the root folder.
    """
    case = case_of(item)
    if case is not None:
        return case.id
    variant = [each for each in item.listchain() if isinstance(each, pytest.Class) or each is item]
    return f"{_joined([*_folders(item), item.path.stem])}/{'.'.join(map(_name_in_id, variant))}"


def _name_in_id(node: pytest.Item | pytest.Collector) -> str:
    return f"{_joined([node.name])}{node.stash.get(_TELLING, '')}"


def _folders(item: pytest.Item) -> tuple[str, ...]:
    root = root_of(item.config)
    paths = [root / str(name).partition("::")[0] for name in item.config.getini("perf_paths")]
    suites = [path if path.is_dir() else path.parent for path in paths if path.exists()]
    mine = max(
        (path for path in suites if item.path.is_relative_to(path)), key=lambda path: len(path.parts), default=root
    )
    if not item.path.is_relative_to(mine):
        return ()
    below = item.path.relative_to(mine)
    # Where two suites have a file of the same name, the suite's own folder belongs to the id.
    is_shared = any((suite / below).exists() for suite in suites if suite != mine)
    own = mine.relative_to(root).parts if is_shared and mine.is_relative_to(root) else ()
    return (*own, *below.parent.parts)


def tell_apart(found: Iterable[pytest.Item | pytest.Collector]) -> None:
    """Give tests and classes of one module or class whose part of an id would be equal a digest of their names.

    Such are `test[A]` and `test[a]`, or `TestDecode` and `Testdecode`: a disk that ignores case would keep their baselines in one
    file. The digest is the same whichever of them run.
    """
    alike: dict[str, list[pytest.Item | pytest.Class]] = {}
    for node in found:
        if isinstance(node, pytest.Class) or (isinstance(node, pytest.Item) and case_of(node) is None):
            alike.setdefault(_name_in_id(node), []).append(node)
    for nodes in alike.values():
        for node in nodes if len(nodes) > 1 else ():
            node.stash[_TELLING] = f".{hashlib.sha256(node.name.encode()).hexdigest()[:4]}"


def _joined(names: Iterable[str]) -> str:
    return ".".join(_NOT_IN_AN_ID.sub("-", name.lower()).strip("-._+") or "unnamed" for name in names)


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
