"""One decode step in plain torch: used without CUDA, and as the reference that the kernels are compared with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as functional

from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.model import Decoder, Layer, times
from hpc_core.engines.decode.prefill import Between, PlainBetween


def turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return the rotary embedding of (batch, heads, tokens, width) by cos and sin that broadcast to it."""
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-right, left], dim=-1) * sin


def _mlp(layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
    gate, up = (module(hidden) for module in layer.gate_up)
    inner = functional.silu(gate, inplace=True).mul_(up)
    del gate, up
    result: torch.Tensor = layer.down(inner)
    return result


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: torch.Tensor, filled: torch.Tensor | int
) -> torch.Tensor:
    """Return one token's attention: query (batch, heads, width) over keys and values (batch, groups, places, width), gives (batch, heads, width).

    Places before `first` (batch,) and from `filled` on are masked. The heads of a group share their keys without a copy.
    """
    batch, heads, width = query.shape
    groups, places = keys.shape[1:3]
    grouped = query.view(batch, groups, heads // groups, width)
    scores = (grouped @ keys.transpose(2, 3)).float() / math.sqrt(width)
    at = torch.arange(places, device=query.device)
    visible = (at[None, :] >= first[:, None]) & (at[None, :] < filled)
    scores = scores.masked_fill(~visible[:, None, None, :], float("-inf"))
    shares = scores.softmax(dim=-1).to(values.dtype)
    return (shares @ values).reshape(batch, heads, width)


class PlainStep:
    """Logits of the next token by torch's own operators. Captured, it reads the whole cache through a mask; eager, only the filled part."""

    kernels = "torch"

    def __init__(
        self,
        decoder: Decoder,
        cache: StaticKeyValues,
        turns: tuple[torch.Tensor, torch.Tensor],
        head: Any,
        *,
        eager: bool,
        compiled: bool = False,
    ):
        self._decoder = decoder
        self._cache = cache
        self._turns = turns
        self.head = "int8" if hasattr(head, "scales") else "plain"
        self._head = head
        self._eager = eager
        self._layer: Any = _layer_step
        if compiled:
            self.kernels = "inductor"
            # One layer is compiled once and serves all, since its weights are arguments.
            options: dict[str, Any] = {"coordinate_descent_tuning": True, "triton.cudagraphs": False}
            self._layer = torch.compile(_layer_step, fullgraph=True, dynamic=False, options=options)

    def owned_weights(self) -> list[torch.Tensor]:
        """Return the weights that it holds in addition to the model's own."""
        return [value for value in vars(self._head).values() if isinstance(value, torch.Tensor)]

    def between(self) -> Between:
        """Return what a prefill computes between products: torch's own operators."""
        return PlainBetween()

    def logits_buffer(self) -> torch.Tensor:
        """Return a buffer (batch, vocabulary) for the first token's logits."""
        decoder = self._decoder
        return torch.zeros(self._cache.batch, decoder.vocabulary, dtype=decoder.dtype, device=decoder.device)

    def settle(self) -> dict[str, str]:
        """Return nothing: there are no block sizes to choose."""
        return {}

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, vocabulary) after `tokens` (batch,), which enter the cache; the caller updates the cache's counters."""
        cache, decoder = self._cache, self._decoder
        positions = (cache.filled - cache.first).long()
        cos, sin = (part[positions][:, None] for part in self._turns)
        places = cache.length + 1 if self._eager else cache.capacity
        hidden = decoder.embedding[tokens]
        for layer, kept in zip(decoder.layers, cache.layers, strict=True):
            hidden = self._layer(
                hidden,
                _taken(layer, compiled=self.kernels == "inductor"),
                decoder.eps,
                decoder.head_width,
                cos,
                sin,
                kept.keys[:, :, :places],
                kept.values[:, :, :places],
                cache.first,
                cache.filled,
            )
        logits: torch.Tensor = self._head(decoder.final_norm(hidden))
        return logits


def _taken(layer: Layer, *, compiled: bool) -> Any:
    """Return the layer's modules, or their tensors for the compiler, which would compile modules again for each layer."""
    if not compiled:
        return layer
    return (
        layer.input_norm.weight,
        *((part.weight, part.bias) for part in layer.qkv),
        layer.output.weight,
        layer.post_norm.weight,
        *(part.weight for part in layer.gate_up),
        layer.down.weight,
    )


def _layer_step(
    hidden: torch.Tensor,
    layer: Any,
    eps: float,
    width: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: torch.Tensor,
    filled: torch.Tensor,
) -> torch.Tensor:
    normed, q, k, v = _projected(hidden, layer, eps)
    batch = hidden.shape[0]
    query, key, value = (part.view(batch, -1, width) for part in (q, k, v))
    query, key = turned(query, cos, sin), turned(key, cos, sin)
    place = filled.long()
    keys.index_copy_(2, place, key[:, :, None])
    values.index_copy_(2, place, value[:, :, None])
    mixed = attend(query, keys, values, first, filled + 1).reshape(batch, -1)
    del normed
    return _fed_forward(hidden, mixed, layer, eps)


def _rms(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    exact = hidden.float()
    scaled = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(hidden.dtype)


def _projected(hidden: torch.Tensor, layer: Any, eps: float) -> tuple[torch.Tensor, ...]:
    if isinstance(layer, Layer):
        normed = layer.input_norm(hidden)
        return (normed, *(module(normed) for module in layer.qkv))
    normed = _rms(hidden, layer[0], eps)
    return (normed, *(times(normed, weight, bias) for weight, bias in layer[1:4]))


def _fed_forward(hidden: torch.Tensor, mixed: torch.Tensor, layer: Any, eps: float) -> torch.Tensor:
    if isinstance(layer, Layer):
        hidden = hidden + layer.output(mixed)
        return hidden + _mlp(layer, layer.post_norm(hidden))
    output, post, gate, up, down = layer[4:]
    hidden = hidden + times(mixed, output)
    normed = _rms(hidden, post, eps)
    inner = functional.silu(times(normed, gate)) * times(normed, up)
    return hidden + times(inner, down)
