"""Triton: a few activation rows (batch 2 to 32) times a weight matrix by tensor cores, and the small kernels around a product.

The batch is padded to sixteen or thirty-two rows inside the kernel. 4-bit matrices: `four_bit_batch`. Layouts, distances and "by eights" are those of `vector_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.vector import (
    by_eights,
    silu_times,
    start_of,
    wait_for_others,
)


@triton.jit
def embed(tokens, table, out, hidden, permuted: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    """Each row's embedding: out (rows, hidden) = table[tokens]."""
    wait_for_others(early)
    row, part = tl.program_id(0), tl.program_id(1)
    columns = part * block + tl.arange(0, block)
    inside = columns < hidden
    values = tl.load(table + tl.load(tokens + row) * hidden + columns, mask=inside)
    tl.store(out + row * hidden + by_eights(columns, hidden, permuted), values, mask=inside)


@triton.jit
def norm_rows(x, gain, out, hidden, eps, block: tl.constexpr, early: tl.constexpr):
    """RMS norm of each row, rounded where transformers rounds; x and gain in the same order."""
    wait_for_others(early)
    row = tl.program_id(0)
    columns = tl.arange(0, block)
    inside = columns < hidden
    values = tl.load(x + row * hidden + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / hidden + eps)
    rounded = (values * scale).to(out.dtype.element_ty).to(tl.float32)
    result = rounded * tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + columns, result.to(out.dtype.element_ty), mask=inside)


@triton.jit
def leave(
    total,
    other,
    bias,
    residual,
    row_scale,
    out,
    row,
    base,
    local,
    n_all,
    batch,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    scaled: tl.constexpr,
    out_permuted: tl.constexpr,
    block_n: tl.constexpr,
    padded: tl.constexpr,
):
    """What follows a product of (block_n, padded): scale, bias, SiLU, residual, and the store."""
    rows = row + tl.arange(0, block_n)
    if scaled:
        total *= tl.load(row_scale + rows)[:, None]
    if has_bias:
        total += tl.load(bias + base + local + tl.arange(0, block_n)).to(tl.float32)[:, None]
    if gated:
        total = silu_times(total, other, out)
    items = tl.arange(0, padded)
    places = items[None, :] * n_all + by_eights(rows, n_all, out_permuted)[:, None]
    inside = (items < batch)[None, :] & (rows < n_all)[:, None]
    if has_residual:
        added = tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty).to(tl.float32) + added
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def plain_rows(
    x,
    w,
    bias,
    residual,
    row_scale,
    out,
    n_first,
    n_second,
    n_all,
    k_size,
    batch,
    second: tl.int64,
    third: tl.int64,
    bias_second: tl.int64,
    bias_third: tl.int64,
    gated: tl.constexpr,
    has_bias: tl.constexpr,
    has_residual: tl.constexpr,
    scaled: tl.constexpr,
    x_permuted: tl.constexpr,
    out_permuted: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    padded: tl.constexpr,
    stages: tl.constexpr,
    early: tl.constexpr,
):
    """out (batch, n_all) = f(x (batch, k_size) · Wᵀ)."""
    wait_for_others(early)
    row = tl.program_id(0) * block_n
    base, local = start_of(row, n_first, n_second, second, third)
    start = w + base + (local + tl.arange(0, block_n))[:, None].to(tl.int64) * k_size
    items = tl.arange(0, padded)
    total = tl.zeros((block_n, padded), tl.float32)
    other = tl.zeros((block_n, padded), tl.float32)
    for k in tl.range(0, k_size, block_k, num_stages=stages):
        columns = k + tl.arange(0, block_k)
        inside = columns < k_size
        at = items[None, :] * k_size + by_eights(columns, k_size, x_permuted)[:, None]
        values = tl.load(x + at, mask=inside[:, None] & (items < batch)[None, :], other=0.0)
        weights = tl.load(start + columns[None, :], mask=inside[None, :], other=0.0).to(values.dtype)
        total = tl.dot(weights, values, total, input_precision="ieee")
        if gated:
            weights = tl.load(start + second + columns[None, :], mask=inside[None, :], other=0.0).to(values.dtype)
            other = tl.dot(weights, values, other, input_precision="ieee")
    bias_base, bias_local = start_of(row, n_first, n_second, bias_second, bias_third)
    leave(
        total,
        other,
        bias,
        residual,
        row_scale,
        out,
        row,
        bias_base,
        bias_local,
        n_all,
        batch,
        gated,
        has_bias,
        has_residual,
        scaled,
        out_permuted,
        block_n,
        padded,
    )
