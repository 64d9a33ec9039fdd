"""Triton: one activation vector times a weight matrix, for batch 1. Bound by the bytes of the matrix.

One program takes `block_n` rows and walks over their columns. What comes before and after a product is part of it: the RMS norm of
the vector (its scale is one number, so it is applied after the sum), dequantization, bias, SiLU times the second half, residual.

A "product" may have up to three matrices one below the other (q, k, v), or two side by side (gate, up). They stay where the model
holds them: `second` and `third` are the distances of their first elements from that of the first.

A launch may begin early, while the one before still runs (programmatic dependent launch): it takes in its first weights, which do
not depend on anything, and only then waits for what the one before leaves. Every kernel waits before it writes, so that the wait for one launch
is a wait for all before it.

Where 4-bit weights are about, activations are stored "by eights": of each eight, which meet the eight codes of a word, first the first two
of all, then the next two of all. Neighbouring words then load neighbouring pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from hpc_core.engine.code_lookup import EIGHT_PRODUCTS

__all__ = ["four_bit_vector", "plain_vector"]

PRODUCTS = tl.constexpr(EIGHT_PRODUCTS)
SHRINK = tl.constexpr(1 / 16)
"""Activations are this much smaller in float16: 260,000 times a weight still does not overflow, 1e-6 is still something."""


@triton.jit
def wait_for_others(early: tl.constexpr):
    """Wait until those before have left their results, then let the next launch begin: so never two are ahead."""
    if early:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def by_eights(index, size, permuted: tl.constexpr):
    """Where element `index` of a vector of `size` is stored."""
    if permuted:  # noqa: SIM108 - a choice at compile time
        place = (index % 8 // 2 * (size // 8) + index // 8) * 2 + index % 2
    else:
        place = index
    return place


@triton.jit
def start_of(row, n_first, n_second, second: tl.int64, third: tl.int64):
    """The distance to the matrix that `row` belongs to, and the row's number in it."""
    in_first = row < n_first
    in_second = row < n_first + n_second
    base = tl.where(in_first, 0, tl.where(in_second, second, third))
    skipped = tl.where(in_first, 0, tl.where(in_second, n_first, n_first + n_second))
    return base, row - skipped


@triton.jit
def silu_times(gate, up, out):
    """SiLU(gate) · up, rounded where the plain path rounds."""
    dtype = out.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up


@triton.jit
def plain_tile(start, columns, k_size, whole: tl.constexpr):
    """These columns of the rows that begin at `start`; zero beyond the last."""
    if whole:
        tile = tl.load(start + columns[None, :])
    else:
        tile = tl.load(start + columns[None, :], mask=(columns < k_size)[None, :], other=0.0)
    return tile


@triton.jit
def plain_vector(
    x,
    w,
    gain,
    bias,
    residual,
    row_scale,
    out,
    n_first,
    n_second,
    n_all,
    k_size: tl.constexpr,
    second: tl.int64,
    third: tl.int64,
    bias_second: tl.int64,
    bias_third: tl.int64,
    eps,
    norm: tl.constexpr,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    scaled: tl.constexpr,
    x_permuted: tl.constexpr,
    out_permuted: tl.constexpr,
    whole: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    early: tl.constexpr,
):
    """out = f(W · norm(x)); W (n_all, k_size) in float32, bfloat16, float16, or int8 with a scale a row; sums in float32."""
    row = tl.program_id(0) * block_n
    base, local = start_of(row, n_first, n_second, second, third)
    lines = local + tl.arange(0, block_n)
    start = w + base + lines[:, None].to(tl.int64) * k_size
    total = tl.zeros((block_n, block_k), tl.float32)
    other = tl.zeros((block_n, block_k), tl.float32)
    squares = tl.zeros((block_k,), tl.float32)
    columns = tl.arange(0, block_k)
    weights = plain_tile(start, columns, k_size, whole)
    beside = plain_tile(start + second, columns, k_size, whole) if gated else weights
    wait_for_others(early)
    for k in tl.range(0, k_size, block_k):
        columns = k + tl.arange(0, block_k)
        inside = (columns < k_size) | whole
        after = columns + block_k
        next_weights = plain_tile(start, after, k_size, False)
        next_beside = plain_tile(start + second, after, k_size, False) if gated else next_weights
        values = tl.load(x + by_eights(columns, k_size, x_permuted), mask=inside, other=0.0).to(tl.float32)
        if norm:
            squares += values * values
            values *= tl.load(gain + by_eights(columns, k_size, x_permuted), mask=inside, other=0.0).to(tl.float32)
        total += weights.to(tl.float32) * values[None, :]
        if gated:
            other += beside.to(tl.float32) * values[None, :]
        weights, beside = next_weights, next_beside
    result = tl.sum(total, 1)
    rows = row + tl.arange(0, block_n)
    if norm:
        result *= tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
    if scaled:
        result *= tl.load(row_scale + rows)
    if has_bias:
        bias_base, bias_local = start_of(row, n_first, n_second, bias_second, bias_third)
        result += tl.load(bias + bias_base + bias_local + tl.arange(0, block_n)).to(tl.float32)
    if gated:
        up = tl.sum(other, 1)
        if norm:
            up *= tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
        result = silu_times(result, up, out)
    places = by_eights(rows, n_all, out_permuted)
    if has_residual:
        result = result.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + places).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty))


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
    total = tl.inline_asm_elementwise(
        PRODUCTS,
        "=f,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [codes, t0, t1, t2, t3, t4, t5, t6, t7, x0[None, :], x1[None, :], x2[None, :], x3[None, :]],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    return total


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
def four_bit_tile(codes_of, scales_of, columns, words, whole: tl.constexpr):
    """These words of the rows that begin at `codes_of`, and the constant of each; zero beyond the last."""
    if whole:
        codes = tl.load(codes_of + columns[None, :])
        scales = tl.load(scales_of + (columns // 8)[None, :])
    else:
        inside = (columns < words)[None, :]
        codes = tl.load(codes_of + columns[None, :], mask=inside, other=0)
        scales = tl.load(scales_of + (columns // 8)[None, :], mask=inside, other=0.0)
    return codes, scales


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
    bf16: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    early: tl.constexpr,
):
    """As `plain_vector` for bitsandbytes' 4-bit layout: words of eight codes, a float32 constant for each 64 weights of a row.

    x and gain are stored by eights, and are words where codes are looked up by permutes. `block_k` counts words. `table` holds the sixteen
    values in float32, `tables` their bytes.
    """
    row = tl.program_id(0) * block_n
    base, local = start_of(row, n_first, n_second, second, third)
    absmax_base, _ = start_of(row, n_first, n_second, absmax_second, absmax_third)
    lines = (local + tl.arange(0, block_n))[:, None].to(tl.int64)
    words = k_size // 8
    codes_of = w + base + lines * words
    scales_of = absmax + absmax_base + lines * (words // 8)
    total = tl.zeros((block_n, block_k), tl.float32)
    other = tl.zeros((block_n, block_k), tl.float32)
    squares = tl.zeros((block_k,), tl.float32)
    columns = tl.arange(0, block_k)
    codes, scales = four_bit_tile(codes_of, scales_of, columns, words, whole)
    codes_up, scales_up = codes, scales
    if gated:
        codes_up, scales_up = four_bit_tile(codes_of + second, scales_of + absmax_second, columns, words, whole)
    wait_for_others(early)
    t0, t1, t2, t3 = tl.load(tables), tl.load(tables + 1), tl.load(tables + 2), tl.load(tables + 3)
    t4, t5, t6, t7 = tl.load(tables + 4), tl.load(tables + 5), tl.load(tables + 6), tl.load(tables + 7)
    for k in tl.range(0, words, block_k):
        columns = k + tl.arange(0, block_k)
        inside = (columns < words) | whole
        after = columns + block_k
        next_codes, next_scales = four_bit_tile(codes_of, scales_of, after, words, False)
        next_up, next_scales_up = next_codes, next_scales
        if gated:
            next_up, next_scales_up = four_bit_tile(codes_of + second, scales_of + absmax_second, after, words, False)
        if permutes:
            x0, s0 = pair(x, gain, columns, inside, norm, bf16)
            x1, s1 = pair(x, gain, words + columns, inside, norm, bf16)
            x2, s2 = pair(x, gain, 2 * words + columns, inside, norm, bf16)
            x3, s3 = pair(x, gain, 3 * words + columns, inside, norm, bf16)
            square = s0 + s1 + s2 + s3
            part = products_by_bytes(codes, t0, t1, t2, t3, t4, t5, t6, t7, x0, x1, x2, x3)
        else:
            part, square = products_by_loads(codes, table, x, gain, columns, words, inside, norm)
        total += part * scales
        squares += square
        if gated:
            if permutes:
                part = products_by_bytes(codes_up, t0, t1, t2, t3, t4, t5, t6, t7, x0, x1, x2, x3)
            else:
                part, square = products_by_loads(codes_up, table, x, gain, columns, words, inside, norm)
            other += part * scales_up
        codes, scales, codes_up, scales_up = next_codes, next_scales, next_up, next_scales_up
    result = tl.sum(total, 1)
    if permutes:
        result *= 1 / SHRINK
    rows = row + tl.arange(0, block_n)
    if norm:
        result *= tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
    if has_bias:
        bias_base, bias_local = start_of(row, n_first, n_second, bias_second, bias_third)
        result += tl.load(bias + bias_base + bias_local + tl.arange(0, block_n)).to(tl.float32)
    if gated:
        up = tl.sum(other, 1)
        if permutes:
            up *= 1 / SHRINK
        if norm:
            up *= tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
        result = silu_times(result, up, out)
    places = by_eights(rows, n_all, out_permuted)
    if has_residual:
        result = result.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + places).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty))
