"""What findings have in common: their size, so that they can be ranked, and the words for modules and operators.

Modules are grouped by the block of a layer that they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import TypeVar

import msgspec

from hpc_core.record.metrics import Resource
from hpc_core.record.profile import ModuleSeen, Profile
from hpc_core.record.record import Metric

Thing = TypeVar("Thing")
_STAR = "*"
_VIEWS = {
    *(
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "expand",
        "slice",
        "detach",
        "alias",
        "unsqueeze",
        "squeeze",
        "permute",
    ),
    *("reshape", "select", "split", "empty", "empty_like", "as_strided", "unbind"),
}
"""Operators that compute nothing: they follow from others, which are named first."""
_OUTSIDE = {"optimizer": "the optimizer", "": "no module"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A difference in one resource."""

    resource: Resource
    share: float
    """Its size as a share of what there was: 0.1 for a tenth more or less."""
    worse: bool
    """Whether there is more of it than before."""
    line: str
    placed: bool
    """Whether the line says where in the model."""
    details: tuple[str, ...] = ()


def leading(things: Iterable[Thing], size: Callable[[Thing], float], *, share: float, most: int) -> list[Thing]:
    """Return the largest ones, until `most` are there or the next is below `share` of the total."""
    ordered = sorted(things, key=lambda each: -abs(size(each)))
    total = sum(abs(size(each)) for each in ordered)
    return [each for number, each in enumerate(ordered[:most]) if number == 0 or abs(size(each)) >= share * total]


def changed_counts(
    old: Mapping[str, Metric], new: Mapping[str, Metric], names: tuple[str, ...]
) -> list[tuple[str, float | int, float]]:
    """Return the counts among these that changed: name, change, and change as a share of the old value."""
    found = []
    for name in names:
        if name in old and name in new and old[name].unit == new[name].unit:
            change = new[name].value - old[name].value
            if change:
                found.append((name, change, change / old[name].value if old[name].value else 1.0))
    return found


@lru_cache(maxsize=4096)  # a profile has hundreds of lines and few paths
def block(path: str) -> str:
    """Return the part of a layer that a module is in: `model.layers.*.mlp` for `model.layers.*.mlp.act_fn`; itself outside of layers."""
    names = path.split(".")
    if _STAR not in names:
        return path
    return ".".join(names[: names.index(_STAR) + 2])


def parts(path: str) -> str:
    """Return the path below its block, without the name of peft's adapter: `q_proj.lora_A`; empty for the block itself."""
    return path.removeprefix(block(path)).removeprefix(".").removesuffix(".default")


def label(path: str, phase: str, *profiles: Profile | None) -> str:
    """Return a block in words: "LlamaMLP (layers.*.mlp, 28 layers)"; without a module, the phase: "the optimizer"."""
    if not path:
        return _OUTSIDE.get(phase, f"no module ({phase})")
    module = _module(path, [each.modules for each in profiles if each is not None])
    if module is None or module.kind == path:
        return path
    short = path.removeprefix("model.")
    return f"{module.kind} ({short}, {module.count} layers)" if module.count > 1 else f"{module.kind} ({short})"


def _module(path: str, known: list[Mapping[str, ModuleSeen]]) -> ModuleSeen | None:
    return next((modules[path] for modules in known if path in modules), None)


def computes(name: str) -> bool:
    """Return whether an operator, by its short name, does more than to make a view or to allocate."""
    return name not in _VIEWS


@lru_cache(maxsize=4096)
def operator(name: str) -> str:
    """Return an operator without its library and overload: "mul" for "aten.mul.Tensor". Other text stays as it is."""
    names = name.split(".")
    return name if " " in name or len(names) < 2 else names[1]
