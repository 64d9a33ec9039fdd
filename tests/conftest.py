"""Fixtures and settings of all tests. `pytester` runs other projects' suites in a test."""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# pytester unloads the modules that its test was the first to import, and numpy refuses to be loaded twice.
import scipy.special  # noqa: F401

pytest_plugins = ["pytester"]

# `pytest --benchmark` loads this file too, perhaps where the tests' own packages are not installed.
if importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import HealthCheck, settings

    # The same examples on every machine, so that a red build can be reproduced from its commit alone.
    for _profile, _examples in (("quick", 50), ("thorough", 500)):
        settings.register_profile(
            _profile,
            max_examples=_examples,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
    settings.load_profile("quick")  # `make test-all` chooses the other with --hypothesis-profile

_MANY_OBJECTS = 50_000


@pytest.fixture(autouse=True)
def no_local_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ignore the developer's folder of data sets, which would replace the hub."""
    monkeypatch.delenv("HPC_CORE_DATA", raising=False)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache batches in a temporary folder rather than in the developer's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPC_CORE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    """Use one thread for small tensors: on a busy machine two spend ten times as long waiting for each other."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_garbage_collection_of_libraries() -> None:
    """Exclude the libraries' half million objects from garbage collection, which measuring a case runs several times.

    Only where many are new: an object that is frozen while in use, and later lies in a cycle, stays until the end.
    """
    if len(gc.get_objects(generation=2)) > _MANY_OBJECTS:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a test's own suite strict only where the test asks for it."""
    monkeypatch.delenv("CI", raising=False)


@pytest.fixture(autouse=True)
def path_to_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let printed commands begin with `pytest`, as where the environment is activated."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@pytest.fixture(autouse=True)
def no_xdist_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test's own suite outside xdist: in a worker's child, pytest-benchmark takes no samples."""
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)


_NEED_COMPILER = ("predict/", "plugin/test_predicted", "cli/test_predict", "cli/test_fitting")
_NEED_NONE = ("predict/test_allocator", "predict/test_shim")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of prediction where there is no compiler: prediction compiles a C++ file once."""
    if shutil.which(os.environ.get("CXX", "c++")) is not None:
        return
    for item in items:
        name = item.path.relative_to(Path(__file__).parent).as_posix()
        if name.startswith(_NEED_COMPILER) and not name.startswith(_NEED_NONE):
            item.add_marker(pytest.mark.skip(reason="prediction needs a C++ compiler, and there is none (CXX, c++)"))
