"""Triton: a prompt's activations times a 4-bit matrix in bitsandbytes' layout, dequantized tile by tile: no matrix is ever there dequantized.

A weight is rounded to the activations' type as bitsandbytes rounds it, so the product is that of its dequantized matrix. Imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hpc_core.engine.at_module import at_module
from hpc_core.engine.prefill_products import PrefillProduct

__all__ = ["TiledFourBit", "four_bit_tiles"]

_BLOCK = tl.constexpr(64)
"""Weights of a row that share a constant."""
_ROWS = 64
_FEW, _SOME = 32, 128
"""Tokens of a tile."""
_MANY = 1024
"""From so many tokens on, each piece of a matrix dequantized once for all of them is faster than tile by tile for each 128."""


@triton.jit
def looked_up(table, codes, direct: tl.constexpr):
    """The float32 that each code names. `direct` says how to load it, or the compiler would copy every one of them through shared memory."""
    if direct:
        at = table.to(tl.int64) + codes.to(tl.int64) * 4
        value = tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [at], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        value = tl.load(table + codes)
    return value


@triton.jit
def four_bit_tiles(
    x,
    packed,
    constants,
    table,
    bias,
    out,
    tokens,
    n_size,
    k_size,
    has_bias: tl.constexpr,
    added: tl.constexpr,
    block_n: tl.constexpr,
    block_m: tl.constexpr,
    direct: tl.constexpr,
    stages: tl.constexpr,
):
    """out (tokens, n_size) = x (tokens, k_size) · Wᵀ, plus a bias, plus what is there where it is `added`. k_size is a multiple of 64."""
    items = tl.program_id(0).to(tl.int64) * block_m + tl.arange(0, block_m)
    rows = tl.program_id(1) * block_n + tl.arange(0, block_n)
    real_item, real_row = items < tokens, rows < n_size
    start = packed + rows.to(tl.int64)[:, None] * (k_size // 2) + tl.arange(0, _BLOCK // 2)[None, :]
    line = x + items[None, :] * k_size + tl.arange(0, _BLOCK)[:, None]
    own = constants + rows * (k_size // _BLOCK)
    total = tl.zeros((block_n, block_m), tl.float32)
    for at in tl.range(0, k_size // _BLOCK, num_stages=stages):
        codes = tl.load(start + at * (_BLOCK // 2), mask=real_row[:, None], other=0)
        values = tl.load(line + at * _BLOCK, mask=real_item[None, :], other=0.0)
        scale = tl.load(own + at, mask=real_row, other=0.0)[:, None]
        # The upper half of a byte is the earlier weight.
        earlier, later = looked_up(table, codes >> 4, direct) * scale, looked_up(table, codes & 15, direct) * scale
        weights = tl.join(earlier.to(values.dtype), later.to(values.dtype)).reshape(block_n, _BLOCK)
        total = tl.dot(weights, values, total, input_precision="ieee")
    places = out + items[None, :] * n_size + rows[:, None]
    inside = real_item[None, :] & real_row[:, None]
    if has_bias:
        total += tl.load(bias + rows, mask=real_row, other=0.0).to(tl.float32)[:, None]
    if added:
        total += tl.load(places, mask=inside, other=0.0).to(tl.float32)
    tl.store(places, total.to(out.dtype.element_ty), mask=inside)


class TiledFourBit:
    """bitsandbytes' 4-bit layer by the kernel above; a very long prompt by bitsandbytes' own product, a piece of the matrix after the other."""

    def __init__(self, module: Any, constants: torch.Tensor, many: PrefillProduct):
        self._module = module
        self._packed = module.weight.data.view(-1).view(torch.uint8)
        self._constants = constants
        self._table = module.weight.quant_state.code.float()
        self._rows, self._columns = int(module.out_features), int(module.in_features)
        self._many = many

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, in) times the weight's transpose, plus the bias: (tokens, out)."""
        if len(x) >= _MANY:
            return self._many(x)
        out = x.new_empty((len(x), self._rows))
        self._launch(x, out, added=False)
        return out

    def add_to(self, stream: torch.Tensor, x: torch.Tensor) -> None:
        """The same, added to the stream (tokens, out) in place."""
        if len(x) >= _MANY:
            self._many.add_to(stream, x)
        else:
            self._launch(x, stream, added=True)

    def dequantizes(self, tokens: int) -> bool:
        """Where it leaves the product to bitsandbytes."""
        return tokens >= _MANY

    def _launch(self, x: torch.Tensor, out: torch.Tensor, *, added: bool) -> None:
        tokens, bias = len(x), self._module.bias
        block_m = _FEW if tokens <= _FEW else _SOME
        grid = (triton.cdiv(tokens, block_m), triton.cdiv(self._rows, _ROWS))
        with at_module(self._module):
            four_bit_tiles[grid](
                x, self._packed, self._constants, self._table, self._table if bias is None else bias, out, tokens,
                self._rows, self._columns, has_bias=bias is not None, added=added, block_n=_ROWS, block_m=block_m,
                direct=x.is_cuda, stages=3, num_warps=4,
            )  # fmt: skip
