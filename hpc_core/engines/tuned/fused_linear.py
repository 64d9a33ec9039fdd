"""Autograd functions over projections: linear layers alone, behind a norm, and behind a gate. Each saves the least that its backward needs.

The norm's output and the gated product are not saved: both are made again from what is there anyway, by one kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hpc_core.engines.tuned.pointwise import Pointwise, sum_and_norm
from hpc_core.engines.tuned.projection import (
    PER,
    Projection,
    backward_of,
    forward_of,
    low_of,
    projection_of,
    tensors_of,
)

__all__ = ["added_norm", "gated_linear", "linears", "normed_linears", "patch_linears"]

Found = tuple[torch.Tensor | None, ...]
Shape = tuple[int, ...]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Projection], unread: Shape | None, x: torch.Tensor, *tensors: torch.Tensor | None
    ) -> Any:
        made = None if unread is None else [_nobody_reads(x, unread)]
        outputs, low = forward_of(parts, tensors, x) if made is None else (made, low_of(parts, tensors, x))
        ctx.parts = parts
        ctx.save_for_backward(x if _wants_input(ctx.needs_input_grad[3:]) else None, low, *tensors)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *arrived: torch.Tensor) -> Found:
        x, low, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_x, found = backward_of(ctx.parts, tensors, arrived, x, low, needs[3:], need_input=needs[2])
        return (None, None, d_x, *found)


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Projection],
        eps: float,
        run: Pointwise,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        weight: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> Any:
        total, inner, scale = sum_and_norm(run, x, delta, weight, eps)
        outputs, low = forward_of(parts, tensors, inner)
        ctx.parts, ctx.run, ctx.added = parts, run, delta is not None
        ctx.save_for_backward(total, scale, weight, low, *tensors)
        return (*((total,) if ctx.added else ()), *outputs)

    @staticmethod
    def backward(ctx: Any, *arrived: torch.Tensor) -> Found:
        total, scale, weight, low, *tensors = ctx.saved_tensors
        beside, gradients = (arrived[0], arrived[1:]) if ctx.added else (None, arrived)
        needs = ctx.needs_input_grad
        inner = ctx.run("norm_again", total, scale, weight) if _wants_input(needs[6:]) else None
        wanted = any(needs[3:6])
        d_inner, found = backward_of(ctx.parts, tensors, gradients, inner, low, needs[6:], need_input=wanted)
        d_total = d_weight = None
        if d_inner is not None and (needs[3] or needs[4]):
            d_total = ctx.run("norm_backward", d_inner, total, scale, weight, beside)
        if d_inner is not None and needs[5]:
            d_weight = ctx.run("norm_weight_gradient", d_inner, total, scale)
        return (None, None, None, d_total, d_total if ctx.added else None, d_weight, *found)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        parts: Sequence[Projection],
        run: Pointwise,
        unread: Shape | None,
        gate: torch.Tensor,
        up: torch.Tensor,
        *tensors: torch.Tensor | None,
    ) -> torch.Tensor:
        if unread is None:
            (output,), low = forward_of(parts, tensors, run("swiglu", gate, up))
        else:
            output = _nobody_reads(gate, unread)
            low = low_of(parts, tensors, run("swiglu", gate, up)) if parts[0].lora_a is not None else None
        ctx.parts, ctx.run = parts, run
        ctx.save_for_backward(gate, up, low, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *arrived: torch.Tensor) -> Found:
        gate, up, low, *tensors = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = ctx.run("swiglu", gate, up) if _wants_input(needs[5:]) else None
        wanted = needs[3] or needs[4]
        d_inner, found = backward_of(ctx.parts, tensors, arrived, inner, low, needs[5:], need_input=wanted)
        d_gate = d_up = None
        if d_inner is not None:
            d_up = ctx.run("swiglu_backward", d_inner, gate, up)
            d_gate = d_inner
        return (None, None, None, d_gate, d_up, *found)


class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, eps: float, run: Pointwise, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        total, inner, scale = run("add_and_norm", x, delta, weight, eps)
        ctx.run = run
        ctx.save_for_backward(total, scale, weight)
        normed: torch.Tensor = inner
        return normed

    @staticmethod
    def backward(ctx: Any, *arrived: torch.Tensor) -> Found:
        total, scale, weight = ctx.saved_tensors
        d_total = ctx.run("norm_backward", arrived[0], total, scale, weight, None)
        d_weight = ctx.run("norm_weight_gradient", arrived[0], total, scale) if ctx.needs_input_grad[4] else None
        return (None, None, d_total, d_total, d_weight)


def _wants_input(needs: Sequence[bool]) -> bool:
    """Whether some weight or A wants a gradient, for which the input is needed; B and bias do not need it."""
    return any(wanted and index % PER in (0, 2) for index, wanted in enumerate(needs))


def _nobody_reads(like: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A tensor of this shape, of one element in memory."""
    return like.new_zeros(()).expand(shape)


def linears(parts: Sequence[Projection], x: torch.Tensor, *, unread: Shape | None = None) -> tuple[torch.Tensor, ...]:
    """Each projection of x, (rows, in). `unread`: as of `gated_linear`, for one projection."""
    found: tuple[torch.Tensor, ...] = _Linears.apply(parts, unread, x, *tensors_of(parts))
    return found


def normed_linears(
    parts: Sequence[Projection],
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    run: Pointwise,
) -> tuple[torch.Tensor, ...]:
    """x + delta, or x itself where there is no delta, and each projection of its RMS norm. x and delta: (rows, features)."""
    found: Any = _NormedLinears.apply(parts, eps, run, x, delta, weight, *tensors_of(parts))
    return tuple(found) if delta is not None else (x, *found)


def added_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, run: Pointwise) -> torch.Tensor:
    """RMS norm of x + delta, both (rows, features)."""
    found: torch.Tensor = _AddedNorm.apply(eps, run, x, delta, weight)
    return found


def gated_linear(
    part: Projection, gate: torch.Tensor, up: torch.Tensor, run: Pointwise, *, unread: Shape | None = None
) -> torch.Tensor:
    """The projection of silu(gate) * up, both (rows, inner).

    `unread`: the output's shape, where only what the backward needs is to be made again; the output is then zeros, and no product is computed.
    """
    found: torch.Tensor = _GatedLinear.apply((part,), run, unread, gate, up, *tensors_of((part,)))
    return found


def patch_linears(layer: torch.nn.Module) -> int:
    """Let each linear layer below `layer` that has an adapter or 4-bit weights compute by `linears`. How many did.

    Raises:
        BuildError: one of them has an adapter of a kind that is not known here.
    """
    patched = 0
    chosen = [(name, module) for name, module in layer.named_modules() if _has_more(module)]
    inside = {f"{name}.base_layer" for name, _ in chosen}
    for name, module in chosen:
        if name in inside:
            continue
        module.forward = _forward_by(projection_of(module))
        patched += 1
    return patched


def _has_more(module: torch.nn.Module) -> bool:
    return hasattr(module, "lora_A") or any(parent.__name__ == "Linear4bit" for parent in type(module).__mro__)


def _forward_by(part: Projection) -> Any:
    def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        (found,) = linears((part,), x.reshape(-1, x.shape[-1]))
        return found.view(*x.shape[:-1], found.shape[-1])

    return forward
