"""What can be counted exactly: operators dispatched below autograd, and the FLOPs of their matrix products."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hpc_core.instruments.formulas import own_formulas

__all__ = ["FREE", "Counts", "counting"]

FREE = {"prim", "profiler"}
"""Operator namespaces that do no work."""


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in FREE:
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Counts:
    """Operators by name and FLOPs, filled when the counting block ends."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.flops = 0

    @property
    def total(self) -> int:
        """Operators dispatched, views included."""
        return self.operators.total()


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count while the block runs: operators as they are dispatched, FLOPs as torch's FlopCounterMode counts them.

    Products that torch does not know are added (`measure.formulas`).
    """
    counts = Counts()
    operators = _Operators()
    with FlopCounterMode(display=False, custom_mapping=own_formulas()) as flops, operators:
        yield counts
    counts.operators = operators.seen
    counts.flops = flops.get_total_flops()
