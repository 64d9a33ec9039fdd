"""Count operators dispatched below autograd, and the FLOPs of their matrix products, exactly.

torch's FlopCounterMode lacks some operators or counts them wrongly: grouped-query attention, products added in place, int4 and
bitsandbytes. Their formulas here take shapes, as FlopCounterMode's do, and count 2 FLOP per multiply-add.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

_FORWARD = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the FLOPs of scores and weighted values: two products per query head of shape (batch, heads, length, width).

    torch 2.11's own formula rejects grouped-query attention, which has fewer key heads than query heads.
    """
    batch, heads, queries, width = query
    keys, value_width = key[2], value[3]
    return int(2 * batch * heads * queries * keys * (width + value_width))


def attention_backward_flops(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """Return the FLOPs of five products per query head: scores again, and the gradients of values, weights, queries and keys.

    Equal to torch's `sdpa_backward_flop_count`, but for any number of key heads.
    """
    batch, heads, queries, width = query
    keys, value_width = key[2], value[3]
    return int(2 * batch * heads * queries * keys * (3 * width + 2 * value_width))


def _gemm_4bit(a: Any, b: Any, shape: Any, *_: Any, **__: Any) -> int:
    return int(2 * prod(a[:-1]) * shape[0] * shape[1])


def _int8(a: Any, b: Any, *_: Any, **__: Any) -> int:
    return int(2 * prod(a[:-1]) * a[-1] * b[0])


def _int8_mixed(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    """Count the int8 product alone: how many outlier columns are multiplied again depends on the data."""
    return _int8(a, b)


_BITSANDBYTES = {
    "gemm_4bit": _gemm_4bit,
    "gemv_4bit": _gemm_4bit,
    "int8_linear_matmul": _int8,
    "int8_scaled_mm": _int8,
    "int8_mixed_scaled_mm": _int8_mixed,
}


def _int8_with_outliers(a: Any, _: Any, quantized: Any, *__: Any, **___: Any) -> int:
    return int(2 * prod(a[:-1]) * a[-1] * quantized[0])


def _int4pack(a: Any, _: Any, __: Any, scale_and_zero: Any, *___: Any, **____: Any) -> int:
    """Count tinygemm's product: `a` is (rows, columns), scales and zeros are (groups, rows of the weight, 2)."""
    return int(2 * a[0] * a[1] * scale_and_zero[1])


def _addmm_in_place(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    """Count `addmm_`: torch 2.13 counts `addmm` and `mm`, but not the one that adds in place."""
    return int(2 * a[0] * a[1] * b[1])


_INT4 = ("_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")


def own_formulas() -> dict[Any, Any]:
    """Return formulas by operator for FlopCounterMode's `custom_mapping`; bitsandbytes' only if the package was imported."""
    formulas: dict[Any, Any] = {torch.ops.aten.addmm_: _addmm_in_place}
    for name in _FORWARD:
        formulas[getattr(torch.ops.aten, name)] = attention_flops
        formulas[getattr(torch.ops.aten, f"{name}_backward")] = attention_backward_flops
    for name in _INT4:
        formulas[getattr(torch.ops.aten, name)] = _int4pack
    for name, formula in _BITSANDBYTES.items():
        with contextlib.suppress(AttributeError):
            formulas[getattr(torch.ops.bitsandbytes, name)] = formula
    return formulas


FREE = {"prim", "profiler"}
"""Operator namespaces that do no work."""


def without_compiling() -> contextlib.AbstractContextManager[Any]:
    """Run functions of torch.compile eagerly in the block, so that a dispatch mode sees their operators.

    Otherwise dynamo would give up on every function that runs under a dispatch mode, and the function would stay eager.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()  # nothing is compiled, and importing dynamo takes a second
    eager: contextlib.AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return eager


def compiled_graphs() -> int:
    """Return how many graphs torch.compile has made in this process."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else int(dynamo.counters["stats"]["unique_graphs"])


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace not in FREE:
            self.counts[str(func)] += 1
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
    """Count operators and FLOPs while the block runs, with torch's FlopCounterMode and `own_formulas`.

    Compiled functions run eagerly.
    """
    counts = Counts()
    operators = _Operators()
    with without_compiling(), FlopCounterMode(display=False, custom_mapping=own_formulas()) as flops, operators:
        yield counts
    counts.operators = operators.counts
    counts.flops = flops.get_total_flops()


_FUSED = "aten._scaled_dot_product_"


def attention_families(operators: Mapping[str, int]) -> Counter[str]:
    """Count the forward calls of each family: "eager", "math" (torch's unfused implementation), or a fused kernel's name.

    Below autograd, a fused kernel is one operator. The math implementation uses `_safe_softmax`, and eager attention `_softmax`;
    losses and greedy search use neither.
    """
    families: Counter[str] = Counter()
    for operator, count in operators.items():
        name = operator.removesuffix(".default")
        if name.startswith(_FUSED) and not name.endswith("_backward"):
            families[name.removeprefix(_FUSED)] += count
        elif name == "aten._safe_softmax":
            families["math"] += count
        elif name == "aten._softmax":
            families["eager"] += count
    return families
