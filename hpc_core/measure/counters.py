"""What can be counted exactly: operators dispatched below autograd, and the FLOPs of their matrix products."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Counts", "counting"]

_FREE = {"prim", "profiler"}
"""Operator namespaces that do no work."""


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in _FREE:
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

    bitsandbytes' fused products are added, which torch cannot know: 2·m·n·k each, as for any matrix product.
    """
    counts = Counts()
    operators = _Operators()
    with FlopCounterMode(display=False, custom_mapping=_bitsandbytes_flops()) as flops, operators:
        yield counts
    counts.operators = operators.seen
    counts.flops = flops.get_total_flops()


def _bitsandbytes_flops() -> dict[Any, Any]:
    """FLOP formulas of the bitsandbytes operators that are registered; none when the package was not imported."""
    formulas: dict[Any, Any] = {}
    for name, formula in (("gemm_4bit", _gemm_4bit), ("int8_linear_matmul", _int8), ("int8_scaled_mm", _int8)):
        with contextlib.suppress(AttributeError):
            formulas[getattr(torch.ops.bitsandbytes, name)] = formula
    return formulas


def _gemm_4bit(a: Any, b: Any, shape: Any, *_: Any, **__: Any) -> int:
    rows = prod(a[:-1])
    return 2 * rows * shape[0] * shape[1]


def _int8(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(a[:-1]) * int(a[-1]) * int(b[0])
