"""What attention takes in, by one product: norm, queries, keys and values side by side, rotation. One autograd function.

Two of the three products are small (1,024 of 5,120 columns at 3B with grouped heads) and would each read the input, and in the backward add to its
gradient, once more. Keys and queries before their rotation are not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hpc_core.engines.tuned.pointwise import Pointwise, sum_and_norm
from hpc_core.engines.tuned.projection import (
    PER,
    Joined,
    backward_of,
    forward_of,
    tensors_of,
)

__all__ = ["attention_input"]


class _AttentionInput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        whole: Joined,
        eps: float,
        run: Pointwise,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> Any:
        total, inner, scale = sum_and_norm(run, x, delta, weight, eps)
        side_by_side = inner @ whole.dense(inner).t()
        _, low = forward_of(whole.projections, tensors, inner, side_by_side.split(whole.rows, dim=1))
        width = cos.shape[2]
        made = run("rotate_and_split", side_by_side, cos, sin, whole.rows[0] // width, whole.rows[1] // width)
        ctx.whole, ctx.run, ctx.added = whole, run, delta is not None
        ctx.save_for_backward(total, scale, weight, low, cos, sin, *tensors)
        return (*((total,) if ctx.added else ()), *made)

    @staticmethod
    def backward(ctx: Any, *arrived: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        total, scale, weight, low, cos, sin, *tensors = ctx.saved_tensors
        beside, gradients = (arrived[0], arrived[1:]) if ctx.added else (None, arrived)
        needs: Sequence[bool] = ctx.needs_input_grad
        whole: Joined = ctx.whole
        side_by_side = ctx.run("rotate_and_join", *gradients, cos, -sin)
        wants_a = any(wanted for index, wanted in enumerate(needs[8:]) if index % PER == 2)
        inner = ctx.run("norm_again", total, scale, weight) if wants_a else None
        wanted = any(needs[3:6])
        d_inner, found = backward_of(
            whole.projections,
            tensors,
            side_by_side.split(whole.rows, dim=1),
            inner,
            low,
            needs[8:],
            need_input=wanted,
            begun=side_by_side @ whole.dense(side_by_side) if wanted else None,
        )
        d_total = d_weight = None
        if d_inner is not None and (needs[3] or needs[4]):
            d_total = ctx.run("norm_backward", d_inner, total, scale, weight, beside)
        if d_inner is not None and needs[5]:
            d_weight = ctx.run("norm_weight_gradient", d_inner, total, scale)
        return (None, None, None, d_total, d_total if ctx.added else None, d_weight, None, None, *found)


def attention_input(
    whole: Joined,
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    angles: tuple[torch.Tensor, torch.Tensor],
    run: Pointwise,
) -> tuple[torch.Tensor, ...]:
    """x + delta, or x itself where there is no delta, and rotated queries, rotated keys and values of its RMS norm.

    x and delta: (rows, features); angles: cos and sin, (length, 1, width); queries, keys, values: (batch, length, heads, width).
    """
    found: Any = _AttentionInput.apply(whole, eps, run, x, delta, weight, *angles, *tensors_of(whole.projections))
    return tuple(found) if delta is not None else (x, *found)
