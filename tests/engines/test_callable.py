"""Steps of the user's own are found, called with their arguments, and refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpc_core.case.errors import BuildError
from hpc_core.case.workloads import CallableSpec
from hpc_core.engines.callable import load_factory

MODULE = """
import json
SEEN = []

def appends(what, times=1):
    def step():
        SEEN.extend([what] * times)
        return SEEN
    return step

def nothing():
    return None

def a_coroutine():
    async def step():
        SEEN.append(1)
    return step

def a_generator():
    def step():
        yield SEEN.append(1)
    return step

def a_future():
    from concurrent.futures import ThreadPoolExecutor
    pool = ThreadPoolExecutor()
    return lambda: pool.submit(SEEN.append, 1)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable module my_steps."""
    (tmp_path / "my_steps.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_steps", raising=False)
    return tmp_path


def test_a_factory_gets_its_arguments_and_its_step_is_called(factories: Path) -> None:
    """A step calls once what the factory returned, in its only phase."""
    program = load_factory(CallableSpec(factory="my_steps:appends", arguments={"what": "x", "times": 2}))
    marks: list[str] = []
    program.step(marks.append)
    program.step()
    import my_steps  # type: ignore[import-not-found]

    assert my_steps.SEEN == ["x"] * 4
    assert tuple(marks) == program.phases == ("step",)
    assert program.period == 1


@pytest.mark.parametrize(
    ("factory", "name"), [("a_coroutine", "coroutine"), ("a_generator", "generator"), ("a_future", "Future")]
)
def test_a_step_whose_work_is_not_done_when_it_returns_is_refused(factories: Path, factory: str, name: str) -> None:
    """A coroutine or generator has done nothing, and a future is another thread's: their numbers would be those of no work."""
    program = load_factory(CallableSpec(factory=f"my_steps:{factory}"))
    with pytest.raises(BuildError, match=rf"The step returned a {name}, so its work is not done .* asyncio.run"):
        program.step()


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_steps:make", "The factory no_such_steps:make cannot be imported.*PYTHONPATH"),
        ("my_steps.inner:make", "The factory my_steps.inner:make cannot be imported"),
        ("my_steps:make", "The module my_steps has no make"),
        ("my_steps:nothing", "must return the step, a callable without arguments; it returned NoneType"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused(factories: Path, factory: str, message: str) -> None:
    """A missing module, name or step is a build error that names it."""
    with pytest.raises(BuildError, match=message):
        load_factory(CallableSpec(factory=factory))


def test_other_arguments_are_refused(factories: Path) -> None:
    """Arguments that a factory does not take are a build error that names both."""
    with pytest.raises(BuildError, match=r"my_steps:appends.*whatever"):
        load_factory(CallableSpec(factory="my_steps:appends", arguments={"whatever": 1}))


def test_an_error_of_the_users_module_is_raised(factories: Path) -> None:
    """An error while the module is imported is raised as it is, a missing package included."""
    (factories / "broken_steps.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_package_at_all"):
        load_factory(CallableSpec(factory="broken_steps:make"))
    (factories / "odd_steps.py").write_text("import json\njson.no_such_function\n")
    with pytest.raises(AttributeError, match="no_such_function"):
        load_factory(CallableSpec(factory="odd_steps:make"))


def test_a_type_error_of_a_factory_is_raised(factories: Path) -> None:
    """A TypeError inside a factory is not reported as one about its arguments."""
    (factories / "failing_steps.py").write_text("def make():\n    return 1 + 'one'\n")
    with pytest.raises(TypeError, match="unsupported operand"):
        load_factory(CallableSpec(factory="failing_steps:make"))
