"""One thing that is different, with its size, so that findings of different kinds can be ranked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypeVar

import msgspec

__all__ = ["Finding", "Resource", "leading"]

Resource = Literal["memory", "device", "work"]
Thing = TypeVar("Thing")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """A difference in one resource."""

    resource: Resource
    share: float
    """Its size against what there was: 0.1 for a tenth more or less."""
    worse: bool
    """Whether there is more of it than before; less is an improvement, and seldom why anybody asks."""
    line: str
    placed: bool
    """Whether the line says where in the model."""
    details: tuple[str, ...] = ()


def leading(things: Iterable[Thing], size: Callable[[Thing], float], *, share: float, most: int) -> list[Thing]:
    """The largest ones, until `most` are there or the next is below `share` of all that there is."""
    ordered = sorted(things, key=lambda each: -abs(size(each)))
    total = sum(abs(size(each)) for each in ordered)
    return [each for number, each in enumerate(ordered[:most]) if number == 0 or abs(size(each)) >= share * total]
