"""Autograd functions over projections, and a decoder layer of Llama's kind made of them. Each function saves as little as its backward needs.

A layer has two halves, attention and MLP. Each half takes the residual stream and a `delta` to be added to it, so that the addition happens in
the kernel of the next norm. A half takes the place of its module's forward, so hooks on `self_attn` and `mlp` see every call, recomputed ones
too. The outputs of the norm and of the gate are not saved; one kernel computes each again from what is saved anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hpc_core.case.errors import BuildError
from hpc_core.engines.tuned.pointwise import Pointwise, sum_and_norm
from hpc_core.engines.tuned.projection import (
    PER,
    Joined,
    Projection,
    backward_of,
    forward_of,
    joined,
    low_of,
    projection_of,
    tensors_of,
)

Found = tuple[torch.Tensor | None, ...]
Shape = tuple[int, ...]


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, parts: Sequence[Projection], unread: Shape | None, x: torch.Tensor, *tensors: torch.Tensor | None
    ) -> Any:
        made = None if unread is None else [_unread_zeros(x, unread)]
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
        residual, gradients = (arrived[0], arrived[1:]) if ctx.added else (None, arrived)
        needs = ctx.needs_input_grad
        inner = ctx.run("norm_again", total, scale, weight) if _wants_input(needs[6:]) else None
        wanted = any(needs[3:6])
        d_inner, found = backward_of(ctx.parts, tensors, gradients, inner, low, needs[6:], need_input=wanted)
        d_total, d_weight = _norm_gradients(ctx, d_inner, total, scale, weight, residual)
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
            output = _unread_zeros(gate, unread)
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


def _norm_gradients(
    ctx: Any,
    d_inner: torch.Tensor | None,
    total: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of a norm's input and weight, None unless needed; x, delta and weight are inputs 3 to 5 of the function."""
    needs = ctx.needs_input_grad
    d_total = d_weight = None
    if d_inner is not None and (needs[3] or needs[4]):
        d_total = ctx.run("norm_backward", d_inner, total, scale, weight, residual)
    if d_inner is not None and needs[5]:
        d_weight = ctx.run("norm_weight_gradient", d_inner, total, scale)
    return d_total, d_weight


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
    """Return whether some weight or A needs a gradient, which takes the input; those of B and bias do not."""
    return any(wanted and index % PER in (0, 2) for index, wanted in enumerate(needs))


def _unread_zeros(like: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Return zeros of this shape that take one element of memory."""
    return like.new_zeros(()).expand(shape)


def linears(parts: Sequence[Projection], x: torch.Tensor, *, unread: Shape | None = None) -> tuple[torch.Tensor, ...]:
    """Return each projection of x (rows, in). `unread`: as in `gated_linear`, for one projection."""
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
    """Return x + delta (x itself without a delta), and each projection of its RMS norm. x and delta: (rows, features)."""
    found: Any = _NormedLinears.apply(parts, eps, run, x, delta, weight, *tensors_of(parts))
    return tuple(found) if delta is not None else (x, *found)


def added_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float, run: Pointwise) -> torch.Tensor:
    """Return the RMS norm of x + delta, both (rows, features)."""
    found: torch.Tensor = _AddedNorm.apply(eps, run, x, delta, weight)
    return found


def gated_linear(
    part: Projection, gate: torch.Tensor, up: torch.Tensor, run: Pointwise, *, unread: Shape | None = None
) -> torch.Tensor:
    """Return the projection of silu(gate) * up, both (rows, inner).

    `unread`: the output's shape, if only what the backward needs is computed again; the output is then zeros, and no product is computed.
    """
    found: torch.Tensor = _GatedLinear.apply((part,), run, unread, gate, up, *tensors_of((part,)))
    return found


def patch_linears(layer: torch.nn.Module) -> int:
    """Make each linear layer below `layer` that has an adapter or 4-bit weights compute by `linears`; return how many.

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


class _AttentionInput(torch.autograd.Function):
    """Norm, one product for queries, keys and values, and rotation; keys and queries before their rotation are not saved.

    Keys and values are small with grouped heads (1,024 of 5,120 columns at 3B). Products of their own would each read the input, and add to its
    gradient, once more.
    """

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
        residual, gradients = (arrived[0], arrived[1:]) if ctx.added else (None, arrived)
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
        d_total, d_weight = _norm_gradients(ctx, d_inner, total, scale, weight, residual)
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
    """Return x + delta (x itself without a delta), and the rotated queries, rotated keys and values of its RMS norm.

    x and delta: (rows, features); angles: cos and sin, (length, 1, width); queries, keys, values: (batch, length, heads, width).
    """
    found: Any = _AttentionInput.apply(whole, eps, run, x, delta, weight, *angles, *tensors_of(whole.projections))
    return tuple(found) if delta is not None else (x, *found)


Pair = tuple[torch.Tensor, torch.Tensor]
_PARTS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class _Rotate(torch.autograd.Function):
    """Rotary positions of queries and keys; nothing but the angles is saved."""

    @staticmethod
    def forward(
        ctx: Any, queries: torch.Tensor, keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, run: Pointwise
    ) -> Any:
        ctx.run = run
        ctx.save_for_backward(cos, sin)
        return run("rotate", queries, keys, cos, sin)

    @staticmethod
    def backward(ctx: Any, *arrived: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*ctx.run("rotate", *arrived, cos, -sin), None, None, None)


class Half:
    """One half of a layer, in place of its module's forward. With `again` it is computed again in the backward."""

    def __init__(self, name: str, module: Any, inside: Callable[..., Pair]):
        self.name = name
        self.module = module
        self.again = False
        self.inside = inside
        self._second = False

    def __call__(self, stream: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        """Return the stream plus delta, and the delta that this half adds next. All (rows, features); cos and sin (length, 1, width)."""
        return self.inside(stream, delta, cos, sin, unread=self._second)

    @contextlib.contextmanager
    def _computing_again(self) -> Iterator[None]:
        self._second = True
        try:
            yield
        finally:
            self._second = False

    def through(self, stream: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        """Call the module, so that its hooks see the call, and a second call if only the input is saved."""
        if not (self.again and torch.is_grad_enabled()):
            plain: Pair = self.module(stream, delta, cos, sin)
            return plain
        total = stream if delta is None else stream + delta
        output: Pair = checkpoint(
            self.module,
            total,
            None,
            cos,
            sin,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), self._computing_again()),
            preserve_rng_state=False,  # it depends on its input alone
            determinism_check="none",
        )
        return total, output[1]


def fuse_halves(layer: Any, run: Pointwise) -> list[Half]:
    """Replace the forwards of a decoder layer's attention and MLP by halves, and return these.

    Raises:
        BuildError: the layer is not built like Llama's: other parts, norms of queries, another activation, a sliding window.
    """
    _check(layer)
    halves = [_attention(layer, run), _mlp(layer, run)]
    for half in halves:
        half.module.forward = half
    return halves


def _check(layer: Any) -> None:
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    odd = [
        name
        for part, owner in (("self_attn", attention), ("mlp", mlp))
        for name in _PARTS[part]
        if not hasattr(owner, name)
    ]
    odd += [name for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    odd += [] if getattr(attention, "sliding_window", None) is None else ["a sliding window"]
    activation = type(getattr(mlp, "act_fn", None)).__name__
    odd += [] if activation in ("SiLU", "SiLUActivation") else [f"the activation {activation}"]
    norms = ("input_layernorm", "post_attention_layernorm")
    odd += [name for name in norms if not hasattr(getattr(layer, name, None), "variance_epsilon")]
    if odd:
        raise BuildError(
            f"fusion='blocks' knows decoder layers of Llama and Qwen2; {type(layer).__name__} differs in {', '.join(odd)}: say fusion='linears'."
        )


def _attention(layer: Any, run: Pointwise) -> Half:
    module, before = layer.self_attn, layer.input_layernorm
    queries_keys_values = tuple(projection_of(getattr(module, name)) for name in _PARTS["self_attn"][:3])
    out = (projection_of(module.o_proj),)
    width, scaling = int(module.head_dim), float(module.scaling)
    whole, eps = joined(queries_keys_values, before.weight.dtype), float(before.variance_epsilon)

    def taken_in(
        stream: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        if whole is not None:
            return attention_input(whole, stream, delta, before.weight, eps, (cos, sin), run)
        total, *made = normed_linears(queries_keys_values, stream, delta, before.weight, eps, run)
        q, k, v = (each.view(-1, cos.shape[0], each.shape[-1] // width, width) for each in made)
        return (total, *_Rotate.apply(q, k, cos, sin, run), v)

    def inside(
        stream: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, *, unread: bool = False
    ) -> Pair:
        total, q, k, v = taken_in(stream, delta, cos, sin)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=scaling,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        mixed = mixed.transpose(1, 2).reshape(total.shape[0], -1)
        (output,) = linears(out, mixed, unread=tuple(total.shape) if unread else None)
        return total, output

    return Half("attention", module, inside)


def _mlp(layer: Any, run: Pointwise) -> Half:
    module, before = layer.mlp, layer.post_attention_layernorm
    gate_up = tuple(projection_of(getattr(module, name)) for name in _PARTS["mlp"][:2])
    down = projection_of(module.down_proj)

    def inside(
        stream: torch.Tensor, delta: torch.Tensor | None, _: torch.Tensor, __: torch.Tensor, *, unread: bool = False
    ) -> Pair:
        total, gate, up = normed_linears(gate_up, stream, delta, before.weight, float(before.variance_epsilon), run)
        return total, gated_linear(down, gate, up, run, unread=tuple(total.shape) if unread else None)

    return Half("mlp", module, inside)
