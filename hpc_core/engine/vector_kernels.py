"""Triton: one activation vector times a weight matrix, for batch 1. Bound by the bytes of the matrix.

One program takes `block_n` rows and walks over their columns. What comes before and after a product is part of it: the RMS norm of
the vector (its scale is one number, so it is applied after the sum), dequantization, bias, SiLU times the second half, residual.

A "product" may have up to three matrices one below the other (q, k, v), or two side by side (gate, up). They stay where the model
holds them: `second` and `third` are the distances of their first elements from that of the first.

Where 4-bit weights are about, activations are stored "by eights": element k at (k mod 8) · K/8 + k div 8, so that eight codes in one
word meet eight contiguous loads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engine.code_lookup import EIGHT_CODES

__all__ = ["four_bit_vector", "plain_vector"]

LOOKUP = tl.constexpr(EIGHT_CODES)


@triton.jit
def by_eights(index, size, permuted: tl.constexpr):
    """Where element `index` of a vector of `size` is stored."""
    if permuted:  # noqa: SIM108 - a choice at compile time
        place = (index % 8) * (size // 8) + index // 8
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
    k_size,
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
    stages: tl.constexpr,
):
    """out = f(W · norm(x)); W (n_all, k_size) in float32, bfloat16, float16, or int8 with a scale a row; sums in float32."""
    row = tl.program_id(0) * block_n
    base, local = start_of(row, n_first, n_second, second, third)
    lines = local + tl.arange(0, block_n)
    start = w + base + lines[:, None].to(tl.int64) * k_size
    total = tl.zeros((block_n, block_k), tl.float32)
    other = tl.zeros((block_n, block_k), tl.float32)
    squares = tl.zeros((block_k,), tl.float32)
    for k in tl.range(0, k_size, block_k, num_stages=stages):
        columns = k + tl.arange(0, block_k)
        inside = (columns < k_size) | whole
        values = tl.load(x + by_eights(columns, k_size, x_permuted), mask=inside, other=0.0).to(tl.float32)
        if norm:
            squares += values * values
            values *= tl.load(gain + by_eights(columns, k_size, x_permuted), mask=inside, other=0.0).to(tl.float32)
        weights = tl.load(start + columns[None, :], mask=inside[None, :], other=0.0)
        total += weights.to(tl.float32) * values[None, :]
        if gated:
            weights = tl.load(start + second + columns[None, :], mask=inside[None, :], other=0.0)
            other += weights.to(tl.float32) * values[None, :]
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
def eight_products(codes, table, tables, x, gain, at, step, inside, norm: tl.constexpr, permutes: tl.constexpr):
    """Sum over the eight codes of each word (rows, words) of its value times its element of x; and of the squares of x (words,)."""
    if permutes:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            LOOKUP,
            "=&f,=&f,=&f,=&f,=&f,=&f,=&f,=&f,r,r,r,r,r,r,r,r,r",
            [
                codes,
                tl.load(tables),
                tl.load(tables + 1),
                tl.load(tables + 2),
                tl.load(tables + 3),
                tl.load(tables + 4),
                tl.load(tables + 5),
                tl.load(tables + 6),
                tl.load(tables + 7),
            ],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        w0, w1 = tl.load(table + ((codes >> 4) & 15)), tl.load(table + (codes & 15))
        w2, w3 = tl.load(table + ((codes >> 12) & 15)), tl.load(table + ((codes >> 8) & 15))
        w4, w5 = tl.load(table + ((codes >> 20) & 15)), tl.load(table + ((codes >> 16) & 15))
        w6, w7 = tl.load(table + ((codes >> 28) & 15)), tl.load(table + ((codes >> 24) & 15))
    x0, s0 = element(x, gain, at, inside, norm)
    x1, s1 = element(x, gain, at + step, inside, norm)
    x2, s2 = element(x, gain, at + 2 * step, inside, norm)
    x3, s3 = element(x, gain, at + 3 * step, inside, norm)
    x4, s4 = element(x, gain, at + 4 * step, inside, norm)
    x5, s5 = element(x, gain, at + 5 * step, inside, norm)
    x6, s6 = element(x, gain, at + 6 * step, inside, norm)
    x7, s7 = element(x, gain, at + 7 * step, inside, norm)
    first = w0 * x0[None, :] + w1 * x1[None, :] + w2 * x2[None, :] + w3 * x3[None, :]
    last = w4 * x4[None, :] + w5 * x5[None, :] + w6 * x6[None, :] + w7 * x7[None, :]
    return first + last, s0 + s1 + s2 + s3 + s4 + s5 + s6 + s7


@triton.jit
def element(x, gain, at, inside, norm: tl.constexpr):
    """The elements of x at these places, times their gains, and their squares without."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    square = value * value
    if norm:
        value *= tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    return value, square


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
    k_size,
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
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
):
    """As `plain_vector` for bitsandbytes' 4-bit layout: words of eight codes, a float32 constant for each 64 weights of a row.

    x and gain are stored by eights. `block_k` counts words. `table` holds the sixteen values in float32, `tables` their bytes.
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
    for k in tl.range(0, words, block_k, num_stages=stages):
        columns = k + tl.arange(0, block_k)
        inside = (columns < words) | whole
        codes = tl.load(codes_of + columns[None, :], mask=inside[None, :], other=0)
        scales = tl.load(scales_of + (columns // 8)[None, :], mask=inside[None, :], other=0.0)
        part, square = eight_products(codes, table, tables, x, gain, columns, words, inside, norm, permutes)
        total += part * scales
        squares += square
        if gated:
            codes = tl.load(codes_of + second + columns[None, :], mask=inside[None, :], other=0)
            scales = tl.load(scales_of + absmax_second + (columns // 8)[None, :], mask=inside[None, :], other=0.0)
            part, square = eight_products(codes, table, tables, x, gain, columns, words, inside, norm, permutes)
            other += part * scales
    result = tl.sum(total, 1)
    rows = row + tl.arange(0, block_n)
    if norm:
        result *= tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
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
