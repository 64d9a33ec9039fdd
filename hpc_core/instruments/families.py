"""Families of kernels by their names: gemm, attention, elementwise … For the eye and for explanations; nothing is gated by it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

__all__ = ["FAMILIES", "families_of", "family"]

_RULES = (
    # The first that matches decides, so names that hold two words stand where the rarer one is: a 4-bit product dequantizes too.
    ("optimizer", r"multi_tensor_apply|[Oo]ptimizer|Adam|\bsgd|lion_"),
    ("attention", r"sdpa|fmha|flash|[Aa]ttention"),
    ("gemm", r"gemm|nvjet|cutlass|gemv|splitKreduce|\bscal_kernel|wgmma|triton_tem_|_mm_kernel|tinygemm"),
    ("quantization", r"[Qq]uant"),
    ("copy", r"copy_kernel|CatArray|[Cc]opy_?[Bb]atched|copy_device_to_device"),
    ("norm", r"layer_?norm|rms_?norm|GammaBeta|batch_?norm|group_?norm", re.IGNORECASE),
    ("softmax", r"softmax|nll_loss|cross_entropy", re.IGNORECASE),
    (
        "indexing",
        r"index|gather|scatter|embedding|compute_grad_weight|radix_?sort|krn_partial|write_num_of_segments",
        re.I,
    ),
    ("reduction", r"reduce|scan|triton_(red|per)_|\bdot_kernel|ReduceOp"),
    ("elementwise", r"elementwise|pointwise|dropout|distribution|fill|triton_poi_|arange", re.IGNORECASE),
)
_PATTERNS = tuple((name, re.compile(pattern, *flags)) for name, pattern, *flags in _RULES)
FAMILIES = (*(name for name, _ in _PATTERNS), "other")
"""Every family there is, in the order in which names are asked."""


def family(kernel: str) -> str:
    """The family of a kernel, by the name that the profiler gives it; "other" for names that no rule knows."""
    return next((name for name, pattern in _PATTERNS if pattern.search(kernel)), "other")


def families_of(seconds: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, tuple[float, int]]:
    """Seconds and launches by family, the families with the most seconds first, from those by kernel name."""
    total: defaultdict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for name, value in seconds.items():
        key = family(name)
        before = total[key]
        total[key] = (before[0] + value, before[1] + counts[name])
    return dict(sorted(total.items(), key=lambda item: -item[1][0]))
