"""Triton: multiply a few activation rows (batch 2 to 32) by a weight matrix on tensor cores; and the small kernels between products.

    x    (batch, k_size)     padded to `padded` = 16 or 32 rows inside the kernel
    W    (n_all, k_size)     up to three matrices, as in `vector`
    out  (batch, n_all)

         k_size           padded                 padded
       +---------+      +--------+             +--------+
       | block_n |  x   |  x.T   | k_size  =   | block_n|      one program instance
       +---------+      +--------+             +--------+

A program instance multiplies block_n rows of W by all rows of x, block_k columns at a time. `vector` explains the packed layout of
activations and why a launch may start early. `four_bit_batch` is for 4-bit matrices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.vector import packed_place, silu_times, start_of, wait_for_others


@triton.jit
def embed(tokens, table, out, hidden, packed: tl.constexpr, block: tl.constexpr, early: tl.constexpr):
    """out (rows, hidden) = table[tokens]; a program instance copies `block` columns of one row."""
    wait_for_others(early)
    row, part = tl.program_id(0), tl.program_id(1)
    columns = part * block + tl.arange(0, block)
    inside = columns < hidden
    values = tl.load(table + tl.load(tokens + row) * hidden + columns, mask=inside)
    tl.store(out + row * hidden + packed_place(columns, hidden, packed), values, mask=inside)


@triton.jit
def norm_rows(x, gain, out, hidden, eps, block: tl.constexpr, early: tl.constexpr):
    """Write the RMS norm of x (rows, hidden) to out, one row per program instance, rounded where transformers rounds.

    x and gain are stored in the same order.
    """
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
def finish_rows(total, other, around, out, row, rows, batch, bias_base, bias_local, form: tl.constexpr):
    """Apply what `form` asks for to a product (block_n, padded), and store it: row scale, bias, SiLU gate, residual."""
    lines = row + tl.arange(0, form.block_n)
    if form.scaled:
        total *= tl.load(around.row_scale + lines)[:, None]
    if form.bias:
        total += tl.load(around.bias + bias_base + bias_local + tl.arange(0, form.block_n)).to(tl.float32)[:, None]
    if form.gated:
        total = silu_times(total, other, out)
    items = tl.arange(0, form.padded)
    places = items[None, :] * rows.all + packed_place(lines, rows.all, form.out_packed)[:, None]
    inside = (items < batch)[None, :] & (lines < rows.all)[:, None]
    if form.residual:
        added = tl.load(around.residual + places, mask=inside, other=0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty).to(tl.float32) + added
    tl.store(out + places, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def plain_rows(
    x,
    w,
    around,
    out,
    rows,
    k_size,
    batch,
    second: tl.int64,
    third: tl.int64,
    bias_second: tl.int64,
    bias_third: tl.int64,
    form: tl.constexpr,
):
    """out (batch, n_all) = f(x (batch, k_size) · Wᵀ)."""
    block_n: tl.constexpr = form.block_n
    block_k: tl.constexpr = form.block_k
    padded: tl.constexpr = form.padded
    wait_for_others(form.early)
    row = tl.program_id(0) * block_n
    base, local = start_of(row, rows, second, third)
    start = w + base + (local + tl.arange(0, block_n))[:, None].to(tl.int64) * k_size
    items = tl.arange(0, padded)
    total = tl.zeros((block_n, padded), tl.float32)
    other = tl.zeros((block_n, padded), tl.float32)
    for k in tl.range(0, k_size, block_k, num_stages=form.stages):
        columns = k + tl.arange(0, block_k)
        inside = columns < k_size
        at = items[None, :] * k_size + packed_place(columns, k_size, form.x_packed)[:, None]
        values = tl.load(x + at, mask=inside[:, None] & (items < batch)[None, :], other=0.0)
        weights = tl.load(start + columns[None, :], mask=inside[None, :], other=0.0).to(values.dtype)
        total = tl.dot(weights, values, total, input_precision="ieee")
        if form.gated:
            weights = tl.load(start + second + columns[None, :], mask=inside[None, :], other=0.0).to(values.dtype)
            other = tl.dot(weights, values, other, input_precision="ieee")
    bias_base, bias_local = start_of(row, rows, bias_second, bias_third)
    finish_rows(total, other, around, out, row, rows, batch, bias_base, bias_local, form)
