"""Replace a function by one that knows the original, as every patch here does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["replace"]


def replace(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """`owner.name` becomes `make(original)`, for the life of the process; a worker's life is one case."""
    setattr(owner, name, make(getattr(owner, name)))
