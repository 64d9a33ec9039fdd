"""Products of a prefill: many activation rows times one of the model's matrices, or the same added to the stream in place.

What a product takes beside its result is kept small, since a static cache is there already: plain weights are multiplied where they lie, and
4-bit ones some rows of the matrix at a time, so that never a whole matrix is dequantized at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import torch

from hpc_core.engines.decode.at_module import at_module
from hpc_core.engines.decode.model import kind_of

__all__ = ["FourBit", "PrefillProduct", "gated_product", "pieces_of", "prefill_product"]

_PIECE, _PIECE_OF_A_BATCH, _PIECE_OF_A_LARGE_BATCH = 25 * 2**19, 3 * 2**20, 6 * 2**20
"""At most so many weights are dequantized at a time, two bytes each where bfloat16 is computed in: half of Llama-3.2-3B's largest matrix, an eighth, a quarter.
transformers' `generate` dequantizes whole ones while its cache is small; under larger batches it takes most later, with a full cache and nothing dequantized, but a
layer's keys twice. Small pieces are slow: in eighths a prefill of 32 rows of 100 tokens takes 68 ms on an H200, in quarters 51, in halves 44."""
_LARGE_BATCH = 16
_ROWS_STEP = 256
"""Rows of a piece are a multiple of so many: constants that are quantized again have theirs by 256 blocks of 64 weights."""


class PrefillProduct(Protocol):
    """A linear layer as a prefill takes it."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, in) times the weight's transpose, plus the bias: (tokens, out)."""

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """The same, added to the stream (tokens, out) in place."""


class _ByModule:
    """Whatever multiplies by itself."""

    def __init__(self, module: Any):
        self._module = module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = self._module(x)
        return product

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        stream += self(x)


class _Plain:
    """torch's linear layer: its product can be added where the sum lies."""

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
    """A float32 for each block; or those of 256 blocks, and the blocks' own bytes."""
    bias: torch.Tensor | None


def pieces_of(module: Any, at_most_weights: int) -> list[Piece]:
    """Views of a 4-bit layer's matrix, each of about as many rows, of which each has at most so many weights, or 256 rows."""
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
    """bitsandbytes' 4-bit layer, by its own product, a piece of the matrix after the other."""

    def __init__(self, module: Any, pieces: Iterable[Piece]):
        self.module = module
        self.compute: torch.dtype | None = module.compute_dtype
        """The type that this layer multiplies in, where it is not that of x."""
        self._state = module.weight.quant_state
        self._pieces = list(pieces)
        ends = list(itertools.accumulate((piece.shape[0] for piece in self._pieces), initial=0))
        self.parts = [slice(start, end) for start, end in itertools.pairwise(ends)]
        """Columns of the result, a piece each."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, in) times the weight's transpose, plus the bias: (tokens, out)."""
        cast = self.cast(x)
        with at_module(self.module):
            if len(self._pieces) == 1:
                return self.times(cast, 0).to(x.dtype)
            whole = x.new_empty((len(x), self.parts[-1].stop))
            for index, part in enumerate(self.parts):
                whole[:, part] = self.times(cast, index)
            return whole

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """x in the type that this layer computes in."""
        return x if self.compute is None else x.to(self.compute)

    def times(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """The columns of one piece, of x in the type computed in, and in that type."""
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
        """The same, added to the stream (tokens, out) in place."""
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
    """`gated` of both products of x (tokens, in): (tokens, out). Of two that are in equal pieces, piece by piece, so that neither is ever there whole.

    To whoever follows modules each piece is a forward.
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
    """How a prefill of so many rows, whose activations have this type, multiplies by the module's weight."""
    kind = kind_of(module)
    if kind == "plain":
        return _Plain(module)
    # A CPU's 4-bit weights may be packed anew by their first product.
    if kind == "4-bit" and module.weight.is_cuda and _in_pieces(module):
        return FourBit(module, pieces_of(module, _piece_weights(batch)))
    return _ByModule(module)


def _piece_weights(batch: int) -> int:
    if batch == 1:
        return _PIECE
    return _PIECE_OF_A_BATCH if batch < _LARGE_BATCH else _PIECE_OF_A_LARGE_BATCH


def _in_pieces(module: Any) -> bool:
    """Whether bitsandbytes multiplies without casting what it keeps, and blocks begin where rows begin."""
    state = module.weight.quant_state
    readable = not state.nested or state.state2.blocksize == 256
    return bool(readable) and state.shape[1] % state.blocksize == 0
