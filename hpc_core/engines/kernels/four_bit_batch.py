"""Triton: a few activation rows (batch 2 to 32) times a 4-bit matrix in bitsandbytes' layout, by tensor cores.

The columns are shared out among the warps of a program, in turns of eight words: 64 weights of a row, which have one constant. Each part is a product of its own
(the first dimension of a `tl.dot` of three), and the parts are added up at the end: so no warp decodes what another one decodes too.
Layouts, distances and "by eights" are those of `vector_kernels`, the lookup without memory is `code_lookup`'s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.batch import leave
from hpc_core.engines.kernels.four_bit import (
    constant,
    outer_at,
    outer_of_rows,
    starts_of_rows,
)
from hpc_core.engines.kernels.four_bit_format import EIGHT_VALUES, TABLE_COPIES
from hpc_core.engines.kernels.vector import start_of, wait_for_others

VALUES = tl.constexpr(EIGHT_VALUES)
COPIES = tl.constexpr(TABLE_COPIES)


@triton.jit
def side_by_side(even, odd):
    """(parts, rows, words) of even and of odd elements as (parts, rows, 2 · words), in order."""
    both = tl.join(even, odd)
    return both.reshape(both.shape[0], both.shape[1], 2 * both.shape[2])


@triton.jit
def halves(word, like: tl.constexpr):
    """The two values of each word, side by side."""
    even = (word & 0xFFFF).to(tl.int16).to(like, bitcast=True)
    odd = (word >> 16).to(tl.int16).to(like, bitcast=True)
    return side_by_side(even, odd)


@triton.jit
def looked_up(codes, table, shift: tl.constexpr, like: tl.constexpr):
    """Two codes of each word, the even element's above the odd one's, from a table in memory."""
    even = tl.load(table + ((codes >> (shift + 4)) & 15)).to(like)
    odd = tl.load(table + ((codes >> shift) & 15)).to(like)
    return side_by_side(even, odd)


@triton.jit
def pairs_of(codes, table, tables, permutes: tl.constexpr, like: tl.constexpr):
    """The values of all codes, as the four pairs of a word that "by eights" keeps apart."""
    if permutes:
        t0, t1, t2, t3, t4, t5, t6, t7 = tables
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            VALUES,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
            [codes, t0, t1, t2, t3, t4, t5, t6, t7],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        pairs = halves(w0, like), halves(w1, like), halves(w2, like), halves(w3, like)
    else:
        pairs = (
            looked_up(codes, table, 0, like),
            looked_up(codes, table, 8, like),
            looked_up(codes, table, 16, like),
            looked_up(codes, table, 24, like),
        )
    return pairs


@triton.jit
def added(
    total,
    codes_of,
    scales_of,
    blocks_of,
    outer,
    code,
    offset,
    columns,
    blocks,
    words,
    values,
    table,
    tables,
    permutes: tl.constexpr,
    nested: tl.constexpr,
    like: tl.constexpr,
):
    """`total` and the products of these words of each row; a block's constant is applied to the sum over the block."""
    inside, inside_blocks = columns < words, (blocks < words // 8)[:, None]
    codes = tl.load(codes_of[None, :, None] + columns[:, None, :], mask=inside[:, None, :], other=0)
    stored = tl.load(scales_of[None, :] + blocks[:, None], mask=inside_blocks, other=0)
    outers = stored
    if nested:
        outers = outer_at(outer, blocks_of[None, :] + blocks[:, None], inside_blocks)
    v0, v1, v2, v3 = values
    p0, p1, p2, p3 = pairs_of(codes, table, tables, permutes, like)
    part = tl.dot(p0, v0, input_precision="ieee")
    part = tl.dot(p1, v1, part, input_precision="ieee")
    part = tl.dot(p2, v2, part, input_precision="ieee")
    part = tl.dot(p3, v3, part, input_precision="ieee")
    return total + part * constant(stored, outers, code, offset, nested)[:, :, None]


@triton.jit
def four_bit_rows(
    x,
    w,
    absmax,
    table,
    tables,
    bias,
    residual,
    out,
    n_first,
    n_second,
    n_all,
    k_size: tl.constexpr,
    batch,
    second: tl.int64,
    third: tl.int64,
    absmax_second: tl.int64,
    absmax_third: tl.int64,
    outer,
    outer_second: tl.int64,
    outer_third: tl.int64,
    code,
    offsets,
    bias_second: tl.int64,
    bias_third: tl.int64,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    out_permuted: tl.constexpr,
    permutes: tl.constexpr,
    nested: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    padded: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr,
):
    """out (batch, n_all) = f(x (batch, k_size) · Wᵀ), x by eights; `block_k` counts words, eight a part.

    `table` holds the sixteen values in float32, `tables` their bytes in the type of `x`.
    """
    wait_for_others(early)
    parts: tl.constexpr = block_k // 8
    words: tl.constexpr = k_size // 8
    like: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * block_n
    codes_of, scales_of = starts_of_rows(
        w, absmax, row, n_first, n_second, words, second, third, absmax_second, absmax_third, block_n
    )
    outer, blocks_of, offset, offset_up = outer_of_rows(
        outer, offsets, row, n_first, n_second, words, outer_second, outer_third, gated, nested, block_n
    )
    copy = tables + (tl.arange(0, parts) % COPIES)[:, None, None]
    held = (
        tl.load(copy),
        tl.load(copy + COPIES),
        tl.load(copy + 2 * COPIES),
        tl.load(copy + 3 * COPIES),
        tl.load(copy + 4 * COPIES),
        tl.load(copy + 5 * COPIES),
        tl.load(copy + 6 * COPIES),
        tl.load(copy + 7 * COPIES),
    )
    items = tl.arange(0, padded)
    total = tl.zeros((parts, block_n, padded), tl.float32)
    other = tl.zeros((parts, block_n, padded), tl.float32)
    for k in tl.range(0, words, block_k, num_stages=stages):
        first = k + tl.arange(0, parts) * 8
        columns = first[:, None] + tl.arange(0, 8)[None, :]
        blocks = k // 8 + tl.arange(0, parts)
        elements = 2 * first[:, None] + tl.arange(0, 16)[None, :]
        at = x + items[None, None, :] * k_size + elements[:, :, None]
        here = (elements < 2 * words)[:, :, None] & (items < batch)[None, None, :]
        values = (
            tl.load(at, mask=here, other=0.0),
            tl.load(at + 2 * words, mask=here, other=0.0),
            tl.load(at + 4 * words, mask=here, other=0.0),
            tl.load(at + 6 * words, mask=here, other=0.0),
        )
        total = added(
            total, codes_of, scales_of, blocks_of, outer, code, offset,
            columns, blocks, words, values, table, held, permutes, nested, like,
        )  # fmt: skip
        if gated:
            other = added(
                other, codes_of + second, scales_of + absmax_second, blocks_of, outer + outer_second, code, offset_up,
                columns, blocks, words, values, table, held, permutes, nested, like,
            )  # fmt: skip
    bias_base, bias_local = start_of(row, n_first, n_second, bias_second, bias_third)
    leave(
        tl.sum(total, 0),
        tl.sum(other, 0),
        bias,
        residual,
        bias,
        out,
        row,
        bias_base,
        bias_local,
        n_all,
        batch,
        gated,
        has_bias,
        has_residual,
        False,
        out_permuted,
        block_n,
        padded,
    )
