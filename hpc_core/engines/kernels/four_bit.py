"""Triton: multiply one activation vector by a 4-bit matrix in bitsandbytes' layout, dequantizing it on the fly. Read `vector` first.

    one row of W, k_size weights:
       codes      | word 0 | word 1 | ... | word 7 | word 8 | ...      int32, eight codes of 4 bits each
       constants  |        absmax of block 0       | absmax of ...     one for each 64 weights = 8 words
    one byte of a word: the even element's code in the high half, the odd one's in the low half

    weight = value[code] * constant(block)

A constant is stored as a float32, or as a byte that is dequantized first (`form.nested`; see `four_bit_format`).
A program instance takes block_n rows and walks over their words, block_k words at a time. It multiplies the eight values of a word by eight
activations, which the packed layout stores as four pairs, and multiplies the sum by the block's constant. Instructions limit its speed as
much as bytes do, so codes are looked up in registers, by byte permutes, and not in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.four_bit_format import EIGHT_PRODUCTS
from hpc_core.engines.kernels.vector import finish_vector, start_of, wait_for_others

PRODUCTS = tl.constexpr(EIGHT_PRODUCTS)
SHRINK = tl.constexpr(1 / 16)
"""Activations are multiplied by this before they become float16: then the sum of four products does not overflow with activations up to
260,000, and an activation of 1e-6 does not become 0."""


@triton.jit
def unpacked(word, bf16: tl.constexpr):
    """Return the two elements of a word in float32: low half, high half."""
    if bf16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low, high = tl.inline_asm_elementwise(
            "{ .reg .b16 a, b; mov.b32 {a, b}, $2; cvt.f32.f16 $0, a; cvt.f32.f16 $1, b; }",
            "=&f,=&f,r",
            [word],
            dtype=(tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return low, high


@triton.jit
def pair(x, gain, at, inside, form: tl.constexpr):
    """Return two activations times their gains and SHRINK, as a word of two float16; and the sum of the squares of the two activations."""
    low, high = unpacked(tl.load(x + at, mask=inside, other=0), form.bf16)
    square = low * low + high * high
    if form.norm:
        gain_low, gain_high = unpacked(tl.load(gain + at, mask=inside, other=0), form.bf16)
        low *= gain_low
        high *= gain_high
    word = tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high * SHRINK, low * SHRINK], dtype=tl.int32, is_pure=True, pack=1
    )
    return word, square


@triton.jit
def products_by_bytes(codes, tables, pairs):
    """Return, for each word of codes (rows, words), the dot product of its eight values and eight activations; see `four_bit_format`."""
    t0, t1, t2, t3, t4, t5, t6, t7 = tables
    x0, x1, x2, x3 = pairs
    return tl.inline_asm_elementwise(
        PRODUCTS,
        "=f,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [codes, t0, t1, t2, t3, t4, t5, t6, t7, x0[None, :], x1[None, :], x2[None, :], x3[None, :]],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def element(x, gain, at, inside, norm: tl.constexpr):
    """Return the elements of x at these places times their gains, and the squares of the elements."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    square = value * value
    if norm:
        value *= tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    return value, square


@triton.jit
def two_products(codes, table, x, gain, at, inside, shift: tl.constexpr, norm: tl.constexpr):
    """Look up two codes of each word in memory, and multiply their values by x in float32. The even element has the higher nibble."""
    even, even_square = element(x, gain, at, inside, norm)
    odd, odd_square = element(x, gain, at + 1, inside, norm)
    total = tl.load(table + ((codes >> (shift + 4)) & 15)) * even[None, :]
    total += tl.load(table + ((codes >> shift) & 15)) * odd[None, :]
    return total, even_square + odd_square


@triton.jit
def products_by_loads(codes, table, x, gain, columns, words, inside, norm: tl.constexpr):
    """Like `products_by_bytes`, but with codes looked up in memory, and in float32; also return the sums of the squares of x (words,)."""
    p0, s0 = two_products(codes, table, x, gain, 2 * columns, inside, 0, norm)
    p1, s1 = two_products(codes, table, x, gain, 2 * (words + columns), inside, 8, norm)
    p2, s2 = two_products(codes, table, x, gain, 2 * (2 * words + columns), inside, 16, norm)
    p3, s3 = two_products(codes, table, x, gain, 2 * (3 * words + columns), inside, 24, norm)
    return p0 + p1 + p2 + p3, s0 + s1 + s2 + s3


@triton.jit
def outer_at(outer, blocks, inside):
    """Load the outer constants of these blocks of 64 weights; blocks are numbered from the start of their matrix."""
    return tl.load(outer + (blocks >> 8), mask=inside, other=0.0)


@triton.jit
def constant(stored, outer, code, offset, nested: tl.constexpr):
    """Return the blocks' constants in float32: as they are stored, or dequantized from bytes."""
    if nested:  # noqa: SIM108 - a choice at compile time
        value = tl.load(code + stored.to(tl.int32)) * outer + offset
    else:
        value = stored
    return value


@triton.jit
def four_bit_tile(starts, outer, columns, words, whole: tl.constexpr, nested: tl.constexpr):
    """Load these words of some rows, and the stored and the outer constant of each; zero beyond the last word.

    `starts` has three parts, (block_n, 1) each: pointers to the rows' first words, pointers to their first constants, and the numbers of
    their first blocks.
    """
    codes_of, scales_of, blocks_of = starts
    blocks = (columns // 8)[None, :]
    if whole:
        codes = tl.load(codes_of + columns[None, :])
        scales = tl.load(scales_of + blocks)
    else:
        inside = (columns < words)[None, :]
        codes = tl.load(codes_of + columns[None, :], mask=inside, other=0)
        scales = tl.load(scales_of + blocks, mask=inside, other=0)
    outers = scales
    if nested:
        outers = outer_at(outer, blocks_of + blocks, (columns < words)[None, :])
    return codes, scales, outers


@triton.jit
def starts_of_rows(
    matrix,
    row,
    rows,
    words,
    second: tl.int64,
    third: tl.int64,
    absmax_second: tl.int64,
    absmax_third: tl.int64,
    block_n: tl.constexpr,
):
    """Return pointers to the first word and to the first constant of each row, from `row` on: (block_n,) each."""
    base, local = start_of(row, rows, second, third)
    absmax_base, _ = start_of(row, rows, absmax_second, absmax_third)
    lines = (local + tl.arange(0, block_n)).to(tl.int64)
    return matrix.codes + base + lines * words, matrix.absmax + absmax_base + lines * (words // 8)


@triton.jit
def outer_of_rows(matrix, row, rows, words, outer_second: tl.int64, outer_third: tl.int64, form: tl.constexpr):
    """Return what finds the outer constants of the rows from `row` on.

    That is: a pointer to their matrix's outer constants, the number of each row's first block in that matrix (block_n,), the matrix's
    offset, and for a gated product the offset of the second matrix.
    """
    outer, offset, offset_up = matrix.outer, 0.0, 0.0
    base, local = start_of(row, rows, outer_second, outer_third)
    blocks = (local + tl.arange(0, form.block_n)) * (words // 8)
    if form.nested:
        outer += base
        if form.gated:
            offset, offset_up = tl.load(matrix.offsets), tl.load(matrix.offsets + 1)
        else:
            number = (row >= rows.first).to(tl.int32) + (row >= rows.first + rows.second).to(tl.int32)
            offset = tl.load(matrix.offsets + number)
    return outer, blocks, offset, offset_up


@triton.jit
def four_bit_vector(
    x,
    matrix,
    gain,
    around,
    out,
    rows,
    second: tl.int64,
    third: tl.int64,
    absmax_second: tl.int64,
    absmax_third: tl.int64,
    outer_second: tl.int64,
    outer_third: tl.int64,
    bias_second: tl.int64,
    bias_third: tl.int64,
    eps,
    form: tl.constexpr,
):
    """out = f(W · norm(x)), W in 4 bits. x and gain are in the packed layout; for a lookup by permutes, as words of two elements."""
    block_n: tl.constexpr = form.block_n
    block_k: tl.constexpr = form.block_k
    words: tl.constexpr = form.k_size // 8
    nested: tl.constexpr = form.nested
    row = tl.program_id(0) * block_n
    codes_of, scales_of = starts_of_rows(matrix, row, rows, words, second, third, absmax_second, absmax_third, block_n)
    outer, blocks_of, offset, offset_up = outer_of_rows(matrix, row, rows, words, outer_second, outer_third, form)
    starts = (codes_of[:, None], scales_of[:, None], blocks_of[:, None])
    starts_up = (starts[0] + second, starts[1] + absmax_second, starts[2])
    outer_up = outer + outer_second
    total = tl.zeros((block_n, block_k), tl.float32)
    other = tl.zeros((block_n, block_k), tl.float32)
    squares = tl.zeros((block_k,), tl.float32)
    columns = tl.arange(0, block_k)
    tile = four_bit_tile(starts, outer, columns, words, form.whole, nested)
    up = tile
    if form.gated:
        up = four_bit_tile(starts_up, outer_up, columns, words, form.whole, nested)
    at = matrix.tables
    t0, t1, t2, t3 = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    t4, t5, t6, t7 = tl.load(at + 4), tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    tables = (t0, t1, t2, t3, t4, t5, t6, t7)
    wait_for_others(form.early)
    for k in tl.range(0, words, block_k):
        columns = k + tl.arange(0, block_k)
        inside = (columns < words) | form.whole
        after = columns + block_k
        next_tile = four_bit_tile(starts, outer, after, words, False, nested)
        next_up = next_tile
        if form.gated:
            next_up = four_bit_tile(starts_up, outer_up, after, words, False, nested)
        if form.permutes:
            x0, s0 = pair(x, gain, columns, inside, form)
            x1, s1 = pair(x, gain, words + columns, inside, form)
            x2, s2 = pair(x, gain, 2 * words + columns, inside, form)
            x3, s3 = pair(x, gain, 3 * words + columns, inside, form)
            square = s0 + s1 + s2 + s3
            part = products_by_bytes(tile[0], tables, (x0, x1, x2, x3))
        else:
            part, square = products_by_loads(tile[0], matrix.table, x, gain, columns, words, inside, form.norm)
        total += part * constant(tile[1], tile[2], matrix.code, offset, nested)
        squares += square
        if form.gated:
            if form.permutes:
                part = products_by_bytes(up[0], tables, (x0, x1, x2, x3))
            else:
                part, square = products_by_loads(up[0], matrix.table, x, gain, columns, words, inside, form.norm)
            other += part * constant(up[1], up[2], matrix.code, offset_up, nested)
        tile, up = next_tile, next_up
    factor: tl.constexpr = 1 / SHRINK if form.permutes else 1.0
    finish_vector(total, other, squares, around, out, row, rows, bias_second, bias_third, eps, factor, form)
