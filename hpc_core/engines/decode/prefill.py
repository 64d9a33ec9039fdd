"""Prefill: a prompt's keys and values into the static cache, and the hidden state that its first token is chosen by.

The whole cache is there already, with room for an answer that transformers' cache has yet to grow to. So a prefill takes little on top of it: it
works on a third or a quarter of the rows at a time, and what is made is made in place where it can be, and let go at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as functional

from hpc_core.engines.decode.cache import LayerKeyValues, StaticKeyValues
from hpc_core.engines.decode.model import Decoder, Layer
from hpc_core.engines.decode.prefill_products import PrefillProduct, gated_product, prefill_product

__all__ = ["Between", "Places", "PlainBetween", "Prefill"]

_PARTS, _PARTS_IN_FOUR_BITS = 4, 3
"""Parts that the rows of a batch are taken in. One more reads all weights, and dequantizes them, once more; one less takes a third more memory."""
_HALVED_TOKENS = 64
"""From so many tokens on the MLP of plain weights takes one half of them after the other: gate and up are most of what a layer makes."""


@dataclass(frozen=True)
class Places:
    """Where some rows of a batch stand, and what each of their tokens may see."""

    width: int
    first: torch.Tensor
    """(rows,) where each row's prompt begins, after its padding."""
    cos: torch.Tensor
    sin: torch.Tensor
    """(rows or 1, width, head width), by each token's place in its own prompt."""
    allowed: torch.Tensor | None
    """(rows, 1, width, width), or None where nothing is padded: causal attention needs no mask then, and can be a flash kernel's."""


class Between(Protocol):
    """What stands between the products of a layer."""

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """RMS norm of x (tokens, hidden) by this module's weight."""

    def keep(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: LayerKeyValues, places: Places
    ) -> None:
        """Rotate the query (tokens, heads · width) in place; store the rotated key and the value (tokens, groups · width) in the rows' cache."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SiLU(gate) · up, in the gate's place."""


class PlainBetween:
    """By torch's own operators."""

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """RMS norm of x (tokens, hidden), by the module itself."""
        result: torch.Tensor = norm(x)
        return result

    def keep(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: LayerKeyValues, places: Places
    ) -> None:
        """Rotate the query in place; store the rotated key and the value in the rows' cache."""
        groups, head_width = kept.keys.shape[1::2]
        shape = (-1, places.width, groups, head_width)
        for turned in (query, key):
            _turn(
                turned.view(-1, places.width, turned.shape[1] // head_width, head_width),
                places.cos[:, :, None],
                places.sin[:, :, None],
            )
        kept.keys[:, :, : places.width].copy_(key.view(shape).transpose(1, 2))
        kept.values[:, :, : places.width].copy_(value.view(shape).transpose(1, 2))

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """SiLU(gate) · up, in the gate's place."""
        return functional.silu(gate, inplace=True).mul_(up)


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotary embedding of (…, width) in place: `plain_step.turned`, which is compiled, makes three tensors of that size."""
    left, right = heads.chunk(2, dim=-1)
    swapped = torch.cat([-right, left], dim=-1)
    heads.mul_(cos).addcmul_(swapped, sin)


@dataclass(frozen=True)
class _Products:
    layer: Layer
    qkv: tuple[PrefillProduct, ...]
    output: PrefillProduct
    gate: PrefillProduct
    up: PrefillProduct
    down: PrefillProduct
    plain: bool


class Prefill:
    """Fills the cache from prompts, any number of times."""

    def __init__(
        self,
        decoder: Decoder,
        cache: StaticKeyValues,
        turns: tuple[torch.Tensor, torch.Tensor],
        between: Between,
    ):
        self._decoder = decoder
        self._cache = cache
        self._turns = turns
        self._between = between
        self._layers = [self._products(layer) for layer in decoder.layers]

    def _products(self, layer: Layer) -> _Products:
        def made(module: Any) -> PrefillProduct:
            return prefill_product(module, self._decoder.dtype, batch=self._cache.batch)

        plain = not (self._decoder.four_bit or self._decoder.int4)
        gate, up = (made(module) for module in layer.gate_up)
        return _Products(layer, tuple(map(made, layer.qkv)), made(layer.output), gate, up, made(layer.down), plain)

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Fill the cache from (batch, width) ids and give the last position's hidden state (batch, hidden), normed.

        Padding stands on the left; `mask` (batch, width) is zero there, and None where there is none.
        """
        batch, width = ids.shape
        cache = self._cache
        cache.begin(width, None if mask is None else (width - mask.sum(1)).to(torch.int32))
        each = self.rows_at_once
        last = [self._part(slice(start, start + each), ids, padded=mask is not None) for start in range(0, batch, each)]
        return last[0] if len(last) == 1 else torch.cat(last)

    @property
    def rows_at_once(self) -> int:
        """Rows of a part."""
        return -(-self._cache.batch // (_PARTS_IN_FOUR_BITS if self._decoder.four_bit else _PARTS))

    def _part(self, rows: slice, ids: torch.Tensor, *, padded: bool) -> torch.Tensor:
        places = self._places(rows, ids.shape[1], padded=padded)
        stream = self._decoder.embedding[ids[rows]].flatten(0, 1)
        for products, whole in zip(self._layers, self._cache.layers, strict=True):
            kept = LayerKeyValues(whole.keys[rows], whole.values[rows])
            self._attend(products, kept, stream, places)
            self._feed_forward(products, stream)
        return self._between.normed(self._decoder.final_norm, stream[places.width - 1 :: places.width])

    def _places(self, rows: slice, width: int, *, padded: bool) -> Places:
        cos, sin = self._turns
        first = self._cache.first[rows]
        if not padded:
            return Places(width, first, cos[None, :width], sin[None, :width], None)
        places = torch.arange(width, device=first.device)
        positions = (places[None] - first[:, None]).clamp(min=0)
        # Padding sees itself, so that no row of the softmax is empty; nobody reads what it gives.
        real = (places[None, :] >= first[:, None])[:, None, None, :]
        causal = places[None, :] <= places[:, None]
        allowed = causal & (real | (places[None, :] == places[:, None]))
        return Places(width, first, cos[positions], sin[positions], allowed)

    def _attend(self, products: _Products, kept: LayerKeyValues, stream: torch.Tensor, places: Places) -> None:
        """Attention, added to the stream (tokens, hidden); its keys and values stay in the cache, its other tensors end with this call."""
        decoder = self._decoder
        query = self._kept(products, kept, stream, places)
        mixed = functional.scaled_dot_product_attention(
            query.view(-1, places.width, decoder.heads, decoder.head_width).transpose(1, 2),
            kept.keys[:, :, : places.width],
            kept.values[:, :, : places.width],
            attn_mask=places.allowed,
            is_causal=places.allowed is None,
            enable_gqa=decoder.groups != decoder.heads,
        )
        del query
        products.output.add_to(stream, mixed.transpose(1, 2).reshape(stream.shape[0], -1))

    def _kept(self, products: _Products, kept: LayerKeyValues, stream: torch.Tensor, places: Places) -> torch.Tensor:
        """The rotated query; keys and values are in the cache then."""
        normed = self._between.normed(products.layer.input_norm, stream)
        query, key, value = (product(normed) for product in products.qkv)
        del normed
        self._between.keep(query, key, value, kept, places)
        return query

    def _feed_forward(self, products: _Products, stream: torch.Tensor) -> None:
        normed = self._between.normed(products.layer.post_norm, stream)
        halves = 2 if products.plain and len(stream) >= _HALVED_TOKENS else 1
        for part, result in zip(normed.chunk(halves), stream.chunk(halves), strict=True):
            inner = gated_product(products.gate, products.up, part, self._between.gated)
            products.down.add_to(result, inner)
            del inner
