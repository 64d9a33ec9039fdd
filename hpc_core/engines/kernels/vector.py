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
def leave_vector(
    total,
    other,
    squares,
    bias,
    residual,
    row_scale,
    out,
    row,
    n_first,
    n_second,
    n_all,
    k_size: tl.constexpr,
    bias_second: tl.int64,
    bias_third: tl.int64,
    eps,
    factor: tl.constexpr,
    norm: tl.constexpr,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    scaled: tl.constexpr,
    out_permuted: tl.constexpr,
    block_n: tl.constexpr,
):
    """What follows a product: its sum, times `factor`, the norm's scale, a row's scale, bias, SiLU, residual, and the store."""
    rows = row + tl.arange(0, block_n)
    spread = factor
    if norm:
        spread = factor * tl.rsqrt(tl.sum(squares, 0) / k_size + eps)
    result = tl.sum(total, 1) * spread
    if scaled:
        result *= tl.load(row_scale + rows)
    if has_bias:
        base, local = start_of(row, n_first, n_second, bias_second, bias_third)
        result += tl.load(bias + base + local + tl.arange(0, block_n)).to(tl.float32)
    if gated:
        result = silu_times(result, tl.sum(other, 1) * spread, out)
    places = by_eights(rows, n_all, out_permuted)
    if has_residual:
        result = result.to(out.dtype.element_ty).to(tl.float32) + tl.load(residual + places).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty))


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
    leave_vector(
        total,
        other,
        squares,
        bias,
        residual,
        row_scale,
        out,
        row,
        n_first,
        n_second,
        n_all,
        k_size,
        bias_second,
        bias_third,
        eps,
        1.0,
        norm,
        gated,
        has_bias,
        has_residual,
        scaled,
        out_permuted,
        block_n,
    )
