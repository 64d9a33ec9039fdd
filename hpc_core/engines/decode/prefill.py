"""Prefill: write a prompt's keys and values into the static cache, and return the hidden state for its first token.

The whole cache already exists, with room for the answer, so a prefill must use little more memory: it takes a third or a quarter of the batch
at a time, works in place where it can, and frees tensors at once. Plain weights are used where they are. 4-bit weights are dequantized
and multiplied some rows of the matrix at a time, never a whole matrix at once.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as functional
from torch.nn.modules import module as hooks

from hpc_core.engines.decode.cache import LayerKeyValues, StaticKeyValues
from hpc_core.engines.decode.model import Decoder, Layer, kind_of


@contextlib.contextmanager
def at_module(module: Any) -> Iterator[None]:
    """Run torch's global forward hooks as if the block were this module's forward, without inputs and outputs. Its own hooks do not run.

    A profile then attributes the block to the module whose weights it uses, although its forward is not called.
    """
    whole: Any = hooks
    for hook in tuple(whole._global_forward_pre_hooks.values()):
        hook(module, ())
    try:
        yield
    finally:
        for key, hook in tuple(whole._global_forward_hooks.items()):
            if key in whole._global_forward_hooks_with_kwargs:
                hook(module, (), {}, None)
            else:
                hook(module, (), None)


_PIECE, _PIECE_OF_A_BATCH, _PIECE_OF_A_LARGE_BATCH = 25 * 2**19, 3 * 2**20, 6 * 2**20
"""The most weights that are dequantized at a time, for one row, for a batch, and for a large batch. Of Llama-3.2-3B's largest matrix they are half,
an eighth and a quarter. A dequantized weight takes two bytes in bfloat16.

transformers' `generate` dequantizes whole matrices, which gives its peak while the cache is small. With larger batches its peak comes later:
the cache is full, a layer's keys exist twice, and nothing is dequantized. Small pieces are slow: a prefill of 32 rows of 100 tokens takes
68 ms on an H200 in eighths, 51 in quarters, 44 in halves."""
_LARGE_BATCH = 16
_ROWS_STEP = 256
"""Rows of a piece are a multiple of this: doubly quantized constants have one constant per 256 blocks of 64 weights."""


class PrefillProduct(Protocol):
    """A linear layer of a prefill."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (tokens, in) times the weight's transpose, plus the bias: (tokens, out)."""

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product to the stream (tokens, out) in place."""


class _ByModule:
    """A module that computes its own product."""

    def __init__(self, module: Any):
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._module(x)
        return product

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        stream += self(x)


class _Plain:
    """torch's linear layer; its product can be added in place."""

    def __init__(self, module: Any):
        self._module = module
        self._transposed: torch.Tensor = module.weight.detach().t()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with at_module(self._module):
            if self._module.bias is None:
                return x @ self._transposed
            return torch.addmm(self._module.bias, x, self._transposed)

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        with at_module(self._module):
            stream.addmm_(x, self._transposed)


class Piece(NamedTuple):
    """Some rows of a 4-bit matrix, as bitsandbytes' product takes them."""

    packed: torch.Tensor
    shape: list[int]
    constants: tuple[torch.Tensor, ...]
    """A float32 for each block; or a float32 for each 256 blocks, and a byte for each block."""
    bias: torch.Tensor | None


def pieces_of(module: Any, at_most_weights: int) -> list[Piece]:
    """Split a 4-bit layer's matrix into views of about equally many rows, each of at most `at_most_weights` weights, but of at least 256 rows."""
    state = module.weight.quant_state
    rows, columns = state.shape
    most = max(_ROWS_STEP, at_most_weights // columns // _ROWS_STEP * _ROWS_STEP)
    count = -(-rows // most)
    each = -(-rows // count // _ROWS_STEP) * _ROWS_STEP
    return [_piece(module, start, min(each, rows - start)) for start in range(0, rows, each)]


def _piece(module: Any, start: int, rows: int) -> Piece:
    state, bias = module.weight.quant_state, module.bias
    columns = state.shape[1]
    packed = module.weight.data.view(-1).view(torch.uint8)

    def part(values: torch.Tensor, weights: int) -> torch.Tensor:
        return values[start * columns // weights : -(-(start + rows) * columns // weights)]

    constants: tuple[torch.Tensor, ...] = (part(state.absmax, state.blocksize),)
    if state.nested:
        outer = part(state.state2.absmax, state.blocksize * state.state2.blocksize)
        constants = (outer, constants[0])
    return Piece(
        part(packed, 2).view(-1, 1),
        [rows, columns],
        constants,
        None if bias is None else bias.detach()[start : start + rows],
    )


class FourBit:
    """bitsandbytes' 4-bit layer, multiplied by bitsandbytes one piece of the matrix at a time."""

    def __init__(self, module: Any, pieces: Iterable[Piece]):
        self.module = module
        self.compute: torch.dtype | None = module.compute_dtype
        """The type that this layer multiplies in, if it is not that of x."""
        self._state = module.weight.quant_state
        self._pieces = list(pieces)
        ends = list(itertools.accumulate((piece.shape[0] for piece in self._pieces), initial=0))
        self.parts = [slice(start, end) for start, end in itertools.pairwise(ends)]
        """Columns of the result for each piece."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (tokens, in) times the weight's transpose, plus the bias: (tokens, out)."""
        cast = self.cast(x)
        with at_module(self.module):
            if len(self._pieces) == 1:
                return self.times(cast, 0).to(x.dtype)
            whole = x.new_empty((len(x), self.parts[-1].stop))
            for index, part in enumerate(self.parts):
                whole[:, part] = self.times(cast, index)
            return whole

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """Return x in the type that this layer multiplies in."""
        return x if self.compute is None else x.to(self.compute)

    def times(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return one piece's columns of the product. x has the type that this layer multiplies in, and so has the result."""
        state, piece = self._state, self._pieces[index]
        again: dict[str, Any] = {}
        if state.nested:
            again = {
                "absmax_8bit": piece.constants[1],
                "absmax_code": state.state2.code,
                "absmax_offset": state.offset,
            }
        product: torch.Tensor = torch.ops.bitsandbytes.gemm_4bit.default(
            x,
            piece.packed,
            piece.shape,
            piece.constants[0],
            state.blocksize,
            state.quant_type,
            bias=None if piece.bias is None else piece.bias.to(x.dtype),
            **again,
        )
        return product

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """Add the product to the stream (tokens, out) in place."""
        x = self.cast(x)
        with at_module(self.module):
            for index, part in enumerate(self.parts):
                # Rounded to the stream's type before it is added, as the layer itself would give it.
                stream[:, part].add_(self.times(x, index).to(stream.dtype))


def gated_product(
    gate: PrefillProduct,
    up: PrefillProduct,
    x: torch.Tensor,
    gated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return `gated` of both products of x (tokens, in): (tokens, out).

    Two products in equal pieces are computed piece by piece, so that neither exists as a whole. A profile sees each piece as a forward.
    """
    if not (isinstance(gate, FourBit) and isinstance(up, FourBit) and len(gate.parts) > 1 and gate.parts == up.parts):
        return gated(gate(x), up(x))
    inner = x.new_empty((len(x), gate.parts[-1].stop))
    for_gate = gate.cast(x)
    for_up = for_gate if gate.compute == up.compute else up.cast(x)
    for index, part in enumerate(gate.parts):
        with at_module(gate.module):
            first = gate.times(for_gate, index).to(x.dtype)
        with at_module(up.module):
            second = up.times(for_up, index).to(x.dtype)
        inner[:, part] = gated(first, second)
    return inner


def prefill_product(module: Any, dtype: torch.dtype, *, batch: int = 1) -> PrefillProduct:
    """Return what multiplies by the module's weight in a prefill of `batch` rows with activations of this type."""
    kind = kind_of(module)
    if kind == "plain":
        return _Plain(module)
    # On a CPU, bitsandbytes may repack 4-bit weights at their first product.
    if kind == "4-bit" and module.weight.is_cuda and _in_pieces(module):
        return FourBit(module, pieces_of(module, _piece_weights(batch)))
    return _ByModule(module)


def _piece_weights(batch: int) -> int:
    if batch == 1:
        return _PIECE
    return _PIECE_OF_A_BATCH if batch < _LARGE_BATCH else _PIECE_OF_A_LARGE_BATCH


def _in_pieces(module: Any) -> bool:
    """Return whether bitsandbytes multiplies without a cast of stored tensors, and blocks begin where rows begin."""
    state = module.weight.quant_state
    readable = not state.nested or state.state2.blocksize == 256
    return bool(readable) and state.shape[1] % state.blocksize == 0


_PARTS, _PARTS_IN_FOUR_BITS = 4, 3
"""Number of parts that the rows of a batch are split into. One more reads and dequantizes all weights once more; one less needs a third more memory."""
_HALVED_TOKENS = 64
"""From so many tokens on, an MLP with plain weights runs in two halves: gate and up are most of a layer's temporaries."""


@dataclass(frozen=True)
class Places:
    """Positions of some rows of a batch, and what each of their tokens may attend to."""

    width: int
    first: torch.Tensor
    """(rows,) the place where each row's prompt begins, after its padding."""
    cos: torch.Tensor
    sin: torch.Tensor
    """(rows or 1, width, head width), by each token's place in its own prompt."""
    allowed: torch.Tensor | None
    """(rows, 1, width, width), or None where nothing is padded: causal attention then needs no mask, so that a flash kernel can compute it."""


class Between(Protocol):
    """The operations between the products of a layer."""

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the RMS norm of x (tokens, hidden) by this module's weight."""

    def keep(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: LayerKeyValues, places: Places
    ) -> None:
        """Rotate the query (tokens, heads · width) in place; store the rotated key and the value (tokens, groups · width) in the rows' cache."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return SiLU(gate) · up, computed in place of the gate."""


class PlainBetween:
    """`Between` by torch's own operators."""

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the RMS norm of x (tokens, hidden) by the module itself."""
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
        """Return SiLU(gate) · up, computed in place of the gate."""
        return functional.silu(gate, inplace=True).mul_(up)


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Apply the rotary embedding to (…, width) in place. `plain_step.turned` is meant to be compiled; here it would make three tensors of that size."""
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
    """Fill the cache from prompts, any number of times."""

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
        """Fill the cache from ids (batch, width) and return the last position's hidden state (batch, hidden), after the final norm.

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
        # Padding attends to itself, so that no row of the softmax is empty. The result is unused.
        real = (places[None, :] >= first[:, None])[:, None, None, :]
        causal = places[None, :] <= places[:, None]
        allowed = causal & (real | (places[None, :] == places[:, None]))
        return Places(width, first, cos[positions], sin[positions], allowed)

    def _attend(self, products: _Products, kept: LayerKeyValues, stream: torch.Tensor, places: Places) -> None:
        """Add attention to the stream (tokens, hidden). Only its keys and values, in the cache, outlive this call."""
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
        """Write keys and values into the cache; return the rotated query."""
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
