"""Take facts one by one: a fact that cannot be determined is left out and noted, and never stops the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from hpc_core.record.record import Fact

__all__ = ["Look", "dtype_name", "names", "taken"]

Look = Callable[[], Fact | None]
"""Gives a fact; None where the question makes no sense for this case."""


def taken(looks: Mapping[str, Look], notes: list[str]) -> dict[str, Fact]:
    """The facts of all looks; those that raise become notes, since a model of unknown structure is no mismatch."""
    facts = {}
    for name, look in looks.items():
        try:
            fact = look()
        except Exception as error:  # a library's next version may be built otherwise
            notes.append(f"audit: {name} could not be determined: {type(error).__name__}: {error}")
            continue
        if fact is not None:
            facts[name] = fact
    return facts


def dtype_name(dtype: torch.dtype | None) -> str:
    """The name that specifications use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def names(dtypes: Iterable[torch.dtype | None]) -> list[str]:
    """The distinct names, sorted."""
    return sorted({dtype_name(dtype) for dtype in dtypes})
