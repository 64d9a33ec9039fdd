"""A step of the user's own, made by an importable factory."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from hpc_core.case.case import CallableSpec
from hpc_core.case.errors import BuildError
from hpc_core.instruments.program import Mark, Program, unmarked

__all__ = ["CallableProgram", "load_factory"]


class CallableProgram:
    """Calls the step; what it returns is dropped, so that keeping nothing alive is the step's own affair."""

    phases: tuple[str, ...] = ("step",)
    period = 1

    def __init__(self, step: Callable[[], Any]):
        self._step = step

    def step(self, mark: Mark = unmarked) -> None:
        """One call."""
        mark("step")
        self._step()


def load_factory(spec: CallableSpec, device: str = "cpu") -> Program:
    """Import the factory, call it with its arguments, and keep the step it returns.

    A factory with a parameter `device` that has no default, and that the arguments leave out, is given `device`: "cpu" or "cuda".
    What has `phases`, `period` and `step(mark)` is a program already: its peaks are measured by phase.

    Raises:
        BuildError: it cannot be imported, takes other arguments, or returns nothing callable.
    """
    module_name, _, name = spec.factory.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; a package that it imports is not
        raise BuildError(
            f"The factory {spec.factory} cannot be imported: {error}. Is its folder on PYTHONPATH?"
        ) from error
    factory = getattr(module, name, None)
    if factory is None:
        raise BuildError(f"The module {module_name} has no {name}.")
    arguments = _device_for(factory, device) | spec.arguments
    _check_arguments(spec, factory, arguments)
    step = factory(**arguments)
    if all(hasattr(step, name) for name in ("phases", "period", "step")):
        program: Program = step
        return program
    if not callable(step):
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
