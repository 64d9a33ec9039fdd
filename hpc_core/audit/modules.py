"""The fact `modules_own`: whether the code that the model runs is the libraries' own, or somebody left a patch behind.

Libraries such as Liger replace forwards and functions of transformers for the whole process. In a process of its own a case
cannot inherit that; where cases share one (`inline`), or a plugin patches on import, this tells.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

from hpc_core.audit.facts import taken
from hpc_core.record.record import Fact

__all__ = ["module_facts"]

_OWN = frozenset({"torch", "transformers", "peft", "bitsandbytes", "accelerate", "kernels"})
"""Whose code a case asks for; `kernels` only lends transformers its decorators."""
_OURS = frozenset({"hpc_core"})
"""A tuned engine, or a fault that this case was asked to run with."""
_SHOWN = 3


def module_facts(model: torch.nn.Module, notes: list[str], *, own_code: bool) -> dict[str, Fact]:
    """Whether every forward of the model, and every function and class of the files that define it, is the libraries' own; or ours, if asked for."""
    own = _OWN | _OURS if own_code else _OWN

    def look() -> Fact:
        foreign = sorted({*_foreign_forwards(model, own), *_foreign_names(model, own)})
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        return Fact(asked="all", seen="all but " + ", ".join(foreign[:_SHOWN]) + more if foreign else "all")

    return taken({"modules_own": look}, notes)


def _foreign_forwards(model: torch.nn.Module, own: frozenset[str]) -> Iterator[str]:
    """Forwards on instances and on their classes."""
    for module in model.modules():
        kind = type(module)
        on_instance = vars(module).get("forward")
        forward = kind.forward if on_instance is None else on_instance
        for origin in _origins(forward):
            if origin.partition(".")[0] not in own:
                yield f"{kind.__name__}.forward from {origin}"


def _foreign_names(model: torch.nn.Module, own: frozenset[str]) -> Iterator[str]:
    """Functions and classes that the files of the decoder define, and that are others by now."""
    names = {kind.__module__ for module in model.modules() for kind in [type(module)]}
    for name in sorted(names):
        if not name.startswith("transformers.models."):
            continue
        module = sys.modules[name]
        for defined in _defined(module):
            value = vars(module).get(defined)
            origins = [value.__module__] if isinstance(value, type) else _origins(value)
            for origin in origins:
                if origin.partition(".")[0] not in own:
                    yield f"{name.rpartition('.')[2]}.{defined} from {origin}"


@functools.cache
def _defined(module: ModuleType) -> tuple[str, ...]:
    """The names that this module's file defines, whatever they are bound to now."""
    tree = ast.parse(inspect.getsource(module))
    return tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def _origins(function: Any) -> list[str]:
    """The modules in which a function and everything that it wraps was written.

    By the globals that the code runs with: `functools.wraps` copies `__module__` and the names, but not those.
    """
    found = []
    while function is not None:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        function = getattr(function, "__func__", function)  # of a bound method
        written = function.__globals__.get("__name__") if isinstance(function, FunctionType) else None
        found.append(str(written or getattr(function, "__module__", None) or type(function).__module__))
        function = getattr(function, "__wrapped__", None)
    return found
