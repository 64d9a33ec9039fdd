"""A decoder layer of Llama's kind in two halves, attention and MLP, each a few functions that save little.

Each half takes what runs along (`stream`) and what is to be added to it (`delta`), so that the addition happens inside the next norm's
kernel. Each is put in the place of its module's forward: hooks on `self_attn` and `mlp` see every call, a recomputed one too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from hpc_core.case.errors import BuildError
from hpc_core.engines.tuned.attention_input import attention_input
from hpc_core.engines.tuned.fused_linear import gated_linear, linears, normed_linears
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.engines.tuned.projection import joined, projection_of

__all__ = ["Half", "fuse_halves"]

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
    """One half of a layer, in the place of its module's forward. With `again` its inside is computed again in the backward."""

    def __init__(self, name: str, module: Any, inside: Callable[..., Pair]):
        self.name = name
        self.module = module
        self.again = False
        self.inside = inside
        self._second = False

    def __call__(self, stream: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        """The stream with delta added, and what this half adds to it next. All (rows, features); cos and sin (length, 1, width)."""
        return self.inside(stream, delta, cos, sin, unread=self._second)

    @contextlib.contextmanager
    def _computing_again(self) -> Iterator[None]:
        self._second = True
        try:
            yield
        finally:
            self._second = False

    def through(self, stream: torch.Tensor, delta: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> Pair:
        """The same by way of the module, so that its hooks see the call, and a second one where only the input is kept."""
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
            preserve_rng_state=False,  # a function of its input alone
            determinism_check="none",
        )
        return total, output[1]


def fuse_halves(layer: Any, run: Pointwise) -> list[Half]:
    """Give attention and MLP of a decoder layer the forwards of this module; a call of either is then a call of its half.

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
