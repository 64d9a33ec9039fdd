"""A user's own step, which an importable factory returns."""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hpc_core.builders.assemble import Built
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError
from hpc_core.case.workloads import CallableSpec
from hpc_core.engines.engine import Engine
from hpc_core.instruments.program import Mark, unmarked
from hpc_core.instruments.program import Program as Steps
from hpc_core.record.findings import Findings


class CallableProgram:
    """A user's own step: a callable, or a program with phases. Its return value is dropped at once.

    Raises, when it is called for the first time:
        BuildError: the call returned before its work was done.
    """

    captured = None

    def __init__(self, step: Callable[[], Any] | Steps):
        given: Any = step
        with_phases = _is_program(given)
        self._step: Callable[[Mark], None] = given.step if with_phases else self._checked(given)
        self.phases: tuple[str, ...] = given.phases if with_phases else ("step",)
        self.period: int = given.period if with_phases else 1

    def step(self, mark: Mark = unmarked) -> None:
        """Call the step once."""
        self._step(mark)

    def _checked(self, call: Callable[[], Any]) -> Callable[[Mark], None]:
        """Return a step that checks what the first call returns. The calls that are measured do not."""

        def first(mark: Mark) -> None:
            mark("step")
            _refuse_unfinished(call())
            self._step = _one_phase(call)

        return first

    def facts(self, found: Findings | None = None) -> Findings:
        """Return no facts: a user's own step has no specification to check."""
        return Findings()

    def counters(self, found: Findings) -> Findings:
        """Return nothing: instruments count everything."""
        return Findings()

    @contextlib.contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Do nothing: steps are never captured by us."""
        yield

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def _is_program(step: Any) -> bool:
    return all(hasattr(step, name) for name in ("phases", "period", "step"))


def _refuse_unfinished(returned: Any) -> None:
    """Refuse a coroutine or a generator, whose body has not run, and a future, whose work somebody else does."""
    is_future = isinstance(returned, concurrent.futures.Future | torch.futures.Future)
    if is_future or inspect.isawaitable(returned) or inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # or Python warns that nobody awaited it
        raise BuildError(
            f"The step returned a {type(returned).__name__}, so its work is not done when the call returns: "
            "run it to its end inside the step, such as by asyncio.run(…), list(…) or .result()."
        )


def _one_phase(call: Callable[[], Any]) -> Callable[[Mark], None]:
    def step(mark: Mark) -> None:
        mark("step")
        call()

    return step


class CallableEngine(Engine):
    """The engine of a user's own step."""

    name = "callable"
    workloads = frozenset({"callable"})

    def unpredictable(self, case: Case) -> str | None:
        """Return None: prediction tries every step, and refuses by name and line what it cannot predict."""
        return None

    def load(self, case: Case, device: torch.device, built: Built | None) -> CallableProgram:
        """Import the factory and build the step. Raises the errors of `load_factory`."""
        assert isinstance(case.workload, CallableSpec)
        return load_factory(case.workload, device.type)


def load_factory(spec: CallableSpec, device: str = "cpu") -> CallableProgram:
    """Import the factory, call it with its arguments, and return the step as a program.

    If the factory has a parameter `device` without a default, and the arguments do not set it, it receives `device`: "cpu" or
    "cuda". An object with `phases`, `period` and `step(mark)` is a program already: its peaks are measured by phase.

    Raises:
        BuildError: the factory cannot be imported, takes other arguments, or returns nothing callable.
    """
    module_name, _, name = spec.factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module exists, but a package that it imports does not
        raise BuildError(
            f"The factory {spec.factory} cannot be imported: {error}. Is its folder on PYTHONPATH?"
        ) from error
    factory = getattr(module, name, None)
    if factory is None:
        raise BuildError(f"The module {module_name} has no {name}.")
    arguments = _device_for(factory, device) | spec.arguments
    _check_arguments(spec, factory, arguments)
    step = factory(**arguments)
    if not callable(step) and not _is_program(step):
        raise BuildError(
            f"{spec.factory} must return the step, a callable without arguments; it returned {type(step).__name__}."
        )
    return CallableProgram(step)


def _device_for(factory: Any, device: str) -> dict[str, str]:
    try:
        wanted = inspect.signature(factory).parameters.get("device")
    except (TypeError, ValueError):  # not callable, or written in C
        return {}
    return {} if wanted is None or wanted.default is not wanted.empty else {"device": device}


def _check_arguments(spec: CallableSpec, factory: Any, arguments: dict[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**arguments)
    except TypeError as error:
        raise BuildError(f"The factory {spec.factory} cannot be called with {spec.arguments}: {error}.") from error
    except ValueError:
        return  # written in C, without a signature
