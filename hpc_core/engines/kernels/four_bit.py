"""Triton: one activation vector times a 4-bit matrix in bitsandbytes' layout, dequantized on the way.

As `vector_kernels`, which see for layouts and launches. Bound by instructions as much as by bytes: hence the lookup without memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.four_bit_format import EIGHT_PRODUCTS
from hpc_core.engines.kernels.vector import leave_vector, start_of, wait_for_others

PRODUCTS = tl.constexpr(EIGHT_PRODUCTS)
SHRINK = tl.constexpr(1 / 16)
"""Activations are this much smaller in float16: 260,000 times a weight still does not overflow, 1e-6 is still something."""


@triton.jit
def unpacked(word, bf16: tl.constexpr):
    """The two elements of a word, in float32: low half, high half."""
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
def pair(x, gain, at, inside, norm: tl.constexpr, bf16: tl.constexpr):
    """A word of activations times their gains as two float16, made smaller; and the squares of what was there."""
    low, high = unpacked(tl.load(x + at, mask=inside, other=0), bf16)
    square = low * low + high * high
    if norm:
        gain_low, gain_high = unpacked(tl.load(gain + at, mask=inside, other=0), bf16)
        low *= gain_low
        high *= gain_high
    word = tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", [high * SHRINK, low * SHRINK], dtype=tl.int32, is_pure=True, pack=1
    )
    return word, square


@triton.jit
def products_by_bytes(codes, t0, t1, t2, t3, t4, t5, t6, t7, x0, x1, x2, x3):
    """Sum of eight values times eight activations for each word of codes (rows, words); see `code_lookup`."""
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
    """The elements of x at these places, times their gains, and their squares without."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    square = value * value
    if norm:
        value *= tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    return value, square


@triton.jit
def two_products(codes, table, x, gain, at, inside, shift: tl.constexpr, norm: tl.constexpr):
    """Two codes of each word, the even element's above the odd one's, looked up in memory and multiplied in float32."""
    even, even_square = element(x, gain, at, inside, norm)
    odd, odd_square = element(x, gain, at + 1, inside, norm)
    total = tl.load(table + ((codes >> (shift + 4)) & 15)) * even[None, :]
    total += tl.load(table + ((codes >> shift) & 15)) * odd[None, :]
    return total, even_square + odd_square


@triton.jit
def products_by_loads(codes, table, x, gain, columns, words, inside, norm: tl.constexpr):
    """As `products_by_bytes` in float32 throughout, and the squares of x (words,)."""
    p0, s0 = two_products(codes, table, x, gain, 2 * columns, inside, 0, norm)
    p1, s1 = two_products(codes, table, x, gain, 2 * (words + columns), inside, 8, norm)
    p2, s2 = two_products(codes, table, x, gain, 2 * (2 * words + columns), inside, 16, norm)
    p3, s3 = two_products(codes, table, x, gain, 2 * (3 * words + columns), inside, 24, norm)
    return p0 + p1 + p2 + p3, s0 + s1 + s2 + s3


@triton.jit
def outer_at(outer, blocks, inside):
    """What the bytes of these blocks of 64 weights, counted from their matrix's first, are multiplied by."""
    return tl.load(outer + (blocks >> 8), mask=inside, other=0.0)


@triton.jit
def constant(stored, outer, code, offset, nested: tl.constexpr):
    """The constants of blocks, in float32: as they are stored, or what their bytes stand for (see `block_constants`)."""
    if nested:  # noqa: SIM108 - a choice at compile time
        value = tl.load(code + stored.to(tl.int32)) * outer + offset
    else:
        value = stored
    return value


@triton.jit
def four_bit_tile(codes_of, scales_of, blocks_of, outer, columns, words, whole: tl.constexpr, nested: tl.constexpr):
    """These words of the rows that begin at `codes_of`, and what makes the constant of each; zero beyond the last."""
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
    w,
    absmax,
    row,
    n_first,
    n_second,
    words,
    second: tl.int64,
    third: tl.int64,
    absmax_second: tl.int64,
    absmax_third: tl.int64,
    block_n: tl.constexpr,
):
    """Where the words, and the constants, of the rows from `row` on begin: (block_n,) pointers each."""
    base, local = start_of(row, n_first, n_second, second, third)
    absmax_base, _ = start_of(row, n_first, n_second, absmax_second, absmax_third)
    lines = (local + tl.arange(0, block_n)).to(tl.int64)
    return w + base + lines * words, absmax + absmax_base + lines * (words // 8)


@triton.jit
def outer_of_rows(
    outer,
    offsets,
    row,
    n_first,
    n_second,
    words,
    outer_second: tl.int64,
    outer_third: tl.int64,
    gated: tl.constexpr,
    nested: tl.constexpr,
    block_n: tl.constexpr,
):
    """Where the outer constants begin of the matrix that the rows from `row` on belong to, these rows' first blocks in it (block_n,), its offset, and of
    two side by side the other's.
    """
    offset, offset_up = 0.0, 0.0
    base, local = start_of(row, n_first, n_second, outer_second, outer_third)
    blocks = (local + tl.arange(0, block_n)) * (words // 8)
    if nested:
        outer += base
        if gated:
            offset, offset_up = tl.load(offsets), tl.load(offsets + 1)
        else:
            offset = tl.load(offsets + (row >= n_first).to(tl.int32) + (row >= n_first + n_second).to(tl.int32))
    return outer, blocks, offset, offset_up


@triton.jit
def four_bit_vector(
    x,
    w,
    absmax,
    table,
    tables,
    gain,
    bias,
    residual,
    out,
    n_first,
    n_second,
    n_all,
    k_size: tl.constexpr,
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
    eps,
    norm: tl.constexpr,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    out_permuted: tl.constexpr,
    whole: tl.constexpr,
    permutes: tl.constexpr,
    nested: tl.constexpr,
    bf16: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    early: tl.constexpr,
):
    """As `plain_vector` for bitsandbytes' 4-bit layout: words of eight codes, a constant for each 64 weights of a row, in float32 or as a byte (`nested`).

    x and gain are stored by eights, and are words where codes are looked up by permutes. `block_k` counts words. `table` holds the sixteen
    values in float32, `tables` their bytes.
    """
    row = tl.program_id(0) * block_n
    words: tl.constexpr = k_size // 8
    codes_of, scales_of = starts_of_rows(
        w, absmax, row, n_first, n_second, words, second, third, absmax_second, absmax_third, block_n
    )
    outer, blocks_of, offset, offset_up = outer_of_rows(
        outer, offsets, row, n_first, n_second, words, outer_second, outer_third, gated, nested, block_n
    )
    codes_of, scales_of, blocks_of = codes_of[:, None], scales_of[:, None], blocks_of[:, None]
    up_of, scales_up_of, outer_up = codes_of + second, scales_of + absmax_second, outer + outer_second
    total = tl.zeros((block_n, block_k), tl.float32)
    other = tl.zeros((block_n, block_k), tl.float32)
    squares = tl.zeros((block_k,), tl.float32)
    columns = tl.arange(0, block_k)
    tile = four_bit_tile(codes_of, scales_of, blocks_of, outer, columns, words, whole, nested)
    up = tile
    if gated:
        up = four_bit_tile(up_of, scales_up_of, blocks_of, outer_up, columns, words, whole, nested)
    t0, t1, t2, t3 = tl.load(tables), tl.load(tables + 1), tl.load(tables + 2), tl.load(tables + 3)
    t4, t5, t6, t7 = tl.load(tables + 4), tl.load(tables + 5), tl.load(tables + 6), tl.load(tables + 7)
    wait_for_others(early)
    for k in tl.range(0, words, block_k):
        columns = k + tl.arange(0, block_k)
        inside = (columns < words) | whole
        after = columns + block_k
        next_tile = four_bit_tile(codes_of, scales_of, blocks_of, outer, after, words, False, nested)
        next_up = next_tile
        if gated:
            next_up = four_bit_tile(up_of, scales_up_of, blocks_of, outer_up, after, words, False, nested)
        if permutes:
            x0, s0 = pair(x, gain, columns, inside, norm, bf16)
            x1, s1 = pair(x, gain, words + columns, inside, norm, bf16)
            x2, s2 = pair(x, gain, 2 * words + columns, inside, norm, bf16)
            x3, s3 = pair(x, gain, 3 * words + columns, inside, norm, bf16)
            square = s0 + s1 + s2 + s3
            part = products_by_bytes(tile[0], t0, t1, t2, t3, t4, t5, t6, t7, x0, x1, x2, x3)
        else:
            part, square = products_by_loads(tile[0], table, x, gain, columns, words, inside, norm)
        total += part * constant(tile[1], tile[2], code, offset, nested)
        squares += square
        if gated:
            if permutes:
                part = products_by_bytes(up[0], t0, t1, t2, t3, t4, t5, t6, t7, x0, x1, x2, x3)
            else:
                part, square = products_by_loads(up[0], table, x, gain, columns, words, inside, norm)
            other += part * constant(up[1], up[2], code, offset_up, nested)
        tile, up = next_tile, next_up
    leave_vector(
        total,
        other,
        squares,
        bias,
        residual,
        bias,
        out,
        row,
        n_first,
        n_second,
        n_all,
        k_size,
        bias_second,
        bias_third,
        eps,
        1 / SHRINK if permutes else 1.0,
        norm,
        gated,
        has_bias,
        has_residual,
        False,
        out_permuted,
        block_n,
    )
