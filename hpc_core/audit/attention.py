"""Facts of attention: which kernel family really ran, by the operators that were counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from hpc_core.audit.facts import taken
from hpc_core.case.case import Case, FinetuneSpec
from hpc_core.record.record import Fact

__all__ = ["attention_facts", "attention_families"]

_FUSED = "aten._scaled_dot_product_"
_FUSED_KERNELS_SINCE = (8, 0)
"""Compute capability from which CUDA has fused kernels for grouped queries in half precision."""


def attention_families(operators: Mapping[str, int]) -> Counter[str]:
    """How often each family's forward ran: "eager", "math" (torch's own unfused way), or a fused kernel's name.

    Below autograd a fused kernel is one operator. The math way takes `_safe_softmax`, eager attention `_softmax`; losses and
    greedy search take neither.
    """
    seen: Counter[str] = Counter()
    for operator, count in operators.items():
        name = operator.removesuffix(".default")
        if name.startswith(_FUSED) and not name.endswith("_backward"):
            seen[name.removeprefix(_FUSED)] += count
        elif name == "aten._safe_softmax":
            seen["math"] += count
        elif name == "aten._softmax":
            seen["eager"] += count
    return seen


def attention_facts(
    case: Case, operators: Mapping[str, int], device: torch.device, notes: list[str]
) -> dict[str, Fact]:
    """Whether attention was fused (sdpa) or eager as asked, and by which kernels: a case cannot ask for those, so that fact always holds."""
    assert case.model is not None
    asked = case.model.attention
    families = attention_families(operators)

    def attention() -> Fact:
        if not families:
            raise LookupError("no operator of attention was seen")
        # Where CUDA has no fused kernel, torch's own choice is the math way: that is what sdpa means there.
        unfused_is_right = "math" in families and not _has_fused(case, device)
        kinds = {_kind(name, unfused_is_right=unfused_is_right) for name in families}
        return Fact(asked=asked, seen=", ".join(sorted(kinds)))

    def kernel() -> Fact | None:
        return Fact(asked=sorted(families), seen=sorted(families)) if families else None

    return taken({"attention": attention, "attention_kernel": kernel}, notes)


def _kind(family: str, *, unfused_is_right: bool) -> str:
    if family == "eager":
        return "eager"
    return "sdpa, unfused (math)" if family == "math" and not unfused_is_right else "sdpa"


def _has_fused(case: Case, device: torch.device) -> bool:
    """Whether torch has a fused kernel for grouped-query attention in this case's dtype.

    CUDA's fused kernels for grouped queries are half precision only (seen on an H100: float32 ran as math).
    """
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) < _FUSED_KERNELS_SINCE:
        return False
    assert case.model is not None
    workload = case.workload
    if isinstance(workload, FinetuneSpec):
        if workload.precision == "autocast-bf16":
            return True
        if workload.prepare:
            return False  # float32 norms hand float32 on, through every quantized layer
    return case.model.dtype != "float32"
