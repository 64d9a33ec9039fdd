"""What every test here may use: pytest's own `pytester`, for stories in which a project of somebody else runs."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# A story in this process forgets the modules that it was the first to import, and numpy refuses to be loaded twice.
import scipy.special  # noqa: F401
from hypothesis import HealthCheck, settings

pytest_plugins = ["pytester"]

# The same examples on every machine: a red build must be reproducible from its commit alone.
for _profile, _examples in (("quick", 50), ("thorough", 500)):
    settings.register_profile(
        _profile,
        max_examples=_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
settings.load_profile("quick")  # `make test-all` takes the other, by --hypothesis-profile

_MANY_OBJECTS = 50_000


@pytest.fixture(autouse=True)
def no_data_sets_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of data sets that the developer's shell names would answer where a test expects the hub, or its absence."""
    monkeypatch.delenv("HPC_CORE_DATA", raising=False)


@pytest.fixture(autouse=True, scope="session")
def a_cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Batches that a test caches are neither found in the developer's folder nor left in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_CORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Small tensors need one thread: on a busy machine two wait for each other ten times as long as one works."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def what_is_imported_is_not_walked_again() -> None:
    """Measuring collects garbage, and looks for tensors, several times a case: not among the half million objects of libraries that earlier tests have imported.

    Only where there are many new ones: what is frozen while it is in use, and later lies in a cycle, stays until the end.
    """
    if len(gc.get_objects(generation=2)) > _MANY_OBJECTS:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_worker_of_xdist(monkeypatch: pytest.MonkeyPatch) -> None:
    """A suite that a test runs is a run of its own: as a worker's child, pytest-benchmark would take no samples."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


_PREDICT = ("predict/", "plugin/test_predicted", "cli/test_predict", "cli/test_fitting")
_NO_NEED = ("predict/test_allocator", "predict/test_shim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Prediction compiles a C++ file once. Where there is no compiler its tests are skipped, and say so."""
    if shutil.which(os.environ.get("CXX", "c++")) is not None:
        return
    for item in items:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        if name.startswith(_PREDICT) and not name.startswith(_NO_NEED):
            item.add_marker(pytest.mark.skip(reason="prediction needs a C++ compiler, and there is none (CXX, c++)"))
