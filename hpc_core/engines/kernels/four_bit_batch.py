"""Triton: multiply a few activation rows (batch 2 to 32) by a 4-bit matrix in bitsandbytes' layout, on tensor cores.

`four_bit` draws the layout of the matrix; `vector` draws that of the activations, and explains launches. A program instance multiplies
block_n rows of the matrix by all rows of x:

    block_k words of each row      | part 0 | part 1 | ... | part block_k/8 - 1 |     a part: 8 words = 64 weights = one constant
                                       |        |               |
    x (padded, 64 elements each)   . dot .  . dot .   ...    . dot .                  the first dimension of a `tl.dot` of three
                                       |        |               |
    total (parts, block_n, padded)   sum over parts at the end

The warps of a program divide the parts among themselves, so that each part is decoded once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.batch import finish_rows
from hpc_core.engines.kernels.four_bit import constant, outer_at, outer_of_rows, starts_of_rows
from hpc_core.engines.kernels.four_bit_format import EIGHT_VALUES, TABLE_COPIES
from hpc_core.engines.kernels.vector import start_of, wait_for_others

VALUES = tl.constexpr(EIGHT_VALUES)
COPIES = tl.constexpr(TABLE_COPIES)


@triton.jit
def interleaved(even, odd):
    """Merge even and odd elements, (parts, rows, words) each, into (parts, rows, 2 * words) in their order."""
    both = tl.join(even, odd)
    return both.reshape(both.shape[0], both.shape[1], 2 * both.shape[2])


@triton.jit
def halves(word, like: tl.constexpr):
    """Return the two values of each word, in order."""
    even = (word & 0xFFFF).to(tl.int16).to(like, bitcast=True)
    odd = (word >> 16).to(tl.int16).to(like, bitcast=True)
    return interleaved(even, odd)


@triton.jit
def looked_up(codes, table, shift: tl.constexpr, like: tl.constexpr):
    """Look up two codes of each word in a table in memory. The even element has the higher nibble."""
    even = tl.load(table + ((codes >> (shift + 4)) & 15)).to(like)
    odd = tl.load(table + ((codes >> shift) & 15)).to(like)
    return interleaved(even, odd)


@triton.jit
def pairs_of(codes, table, tables, permutes: tl.constexpr, like: tl.constexpr):
    """Return the values of all codes as four tensors: the first pairs of all words, the second pairs, and so on, as the packed layout has them."""
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
def add_products(
    total, starts, outer, offset, columns, blocks, values, matrix, tables, form: tl.constexpr, like: tl.constexpr
):
    """Return `total` plus the products of these words of each row; a block's constant multiplies the sum over the block."""
    codes_of, scales_of, blocks_of = starts
    words: tl.constexpr = form.k_size // 8
    inside, inside_blocks = columns < words, (blocks < words // 8)[:, None]
    codes = tl.load(codes_of[None, :, None] + columns[:, None, :], mask=inside[:, None, :], other=0)
    stored = tl.load(scales_of[None, :] + blocks[:, None], mask=inside_blocks, other=0)
    outers = stored
    if form.nested:
        outers = outer_at(outer, blocks_of[None, :] + blocks[:, None], inside_blocks)
    v0, v1, v2, v3 = values
    p0, p1, p2, p3 = pairs_of(codes, matrix.table, tables, form.permutes, like)
    part = tl.dot(p0, v0, input_precision="ieee")
    part = tl.dot(p1, v1, part, input_precision="ieee")
    part = tl.dot(p2, v2, part, input_precision="ieee")
    part = tl.dot(p3, v3, part, input_precision="ieee")
    return total + part * constant(stored, outers, matrix.code, offset, form.nested)[:, :, None]


@triton.jit
def four_bit_rows(
    x,
    matrix,
    around,
    out,
    rows,
    batch,
    second: tl.int64,
    third: tl.int64,
    absmax_second: tl.int64,
    absmax_third: tl.int64,
    outer_second: tl.int64,
    outer_third: tl.int64,
    bias_second: tl.int64,
    bias_third: tl.int64,
    form: tl.constexpr,
):
    """out (batch, n_all) = f(x (batch, k_size) · Wᵀ), W in 4 bits, x in the packed layout."""
    wait_for_others(form.early)
    block_n: tl.constexpr = form.block_n
    block_k: tl.constexpr = form.block_k
    padded: tl.constexpr = form.padded
    k_size: tl.constexpr = form.k_size
    parts: tl.constexpr = block_k // 8
    words: tl.constexpr = k_size // 8
    like: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * block_n
    codes_of, scales_of = starts_of_rows(matrix, row, rows, words, second, third, absmax_second, absmax_third, block_n)
    outer, blocks_of, offset, offset_up = outer_of_rows(matrix, row, rows, words, outer_second, outer_third, form)
    starts = (codes_of, scales_of, blocks_of)
    copy = matrix.tables + (tl.arange(0, parts) % COPIES)[:, None, None]
    tables = (
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
    for k in tl.range(0, words, block_k, num_stages=form.stages):
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
        total = add_products(total, starts, outer, offset, columns, blocks, values, matrix, tables, form, like)
        if form.gated:
            up = (codes_of + second, scales_of + absmax_second, blocks_of)
            outer_up = outer + outer_second
            other = add_products(other, up, outer_up, offset_up, columns, blocks, values, matrix, tables, form, like)
    bias_base, bias_local = start_of(row, rows, bias_second, bias_third)
    finish_rows(tl.sum(total, 0), tl.sum(other, 0), around, out, row, rows, batch, bias_base, bias_local, form)
