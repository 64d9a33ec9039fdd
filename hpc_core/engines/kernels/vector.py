"""Triton: multiply one activation vector by a weight matrix, for batch 1. Reading the matrix limits its speed.

    x  (k_size,)          activations, in their own order or in the packed layout (below)
    W  (n_all, k_size)    row-major; up to three matrices that share x, each where the model holds it

            k_size                       one program instance:
         +-----------+                     - takes block_n rows of one matrix
    W1   |  q        |  n_first rows       - walks over their columns, block_k at a time
         +-----------+                     - sums in float32: total (block_n, block_k)
    W2   |  k        |  n_second rows      - finishes with norm scale, bias, SiLU, residual, store
         +-----------+                         out (n_all,)
    W3   |  v        |  the rest
         +-----------+

The kernels get the address of the first matrix. `second` and `third` are the offsets, in elements, from its first element to those of the
others. A gated product has two matrices side by side instead: W1 is the gate, W2 (at `second`) the up projection, and out = SiLU(W1 x) * (W2 x).

The RMS norm of x is part of the product. Its scale is one number, so it multiplies the finished sum.

Programmatic dependent launch: a launch may begin while the one before it still runs. It loads its first weights, which depend on nothing,
and then waits for the results of the launch before it. Every kernel waits before it writes, so waiting for one launch waits for all before it.

Packed layout, where 4-bit weights are used. A word holds the codes of eight neighbouring elements. Activations are stored in pairs, so that
neighbouring words load neighbouring pairs:

    element   0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15 | ...      (one word of codes each)
    stored    0 1  8 9 ... | 2 3  10 11 ... | 4 5  12 13 ... | 6 7  14 15 ...
              first pairs    second pairs     third pairs      fourth pairs
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_others(early: tl.constexpr):
    """Wait for the results of all earlier launches, then let the next one begin. So no more than one launch runs ahead."""
    if early:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def packed_place(index, size, packed: tl.constexpr):
    """Return where element `index` of a vector of `size` elements is stored."""
    if packed:  # noqa: SIM108 - a choice at compile time
        place = (index % 8 // 2 * (size // 8) + index // 8) * 2 + index % 2
    else:
        place = index
    return place


@triton.jit
def start_of(row, rows, second: tl.int64, third: tl.int64):
    """Return the offset of the matrix that `row` belongs to, and the row's number in it."""
    in_first = row < rows.first
    in_second = row < rows.first + rows.second
    base = tl.where(in_first, 0, tl.where(in_second, second, third))
    skipped = tl.where(in_first, 0, tl.where(in_second, rows.first, rows.first + rows.second))
    return base, row - skipped


@triton.jit
def silu_times(gate, up, out):
    """Return SiLU(gate) * up, rounded to the type of `out` where torch rounds."""
    dtype = out.dtype.element_ty
    gate, up = gate.to(dtype).to(tl.float32), up.to(dtype).to(tl.float32)
    return (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up


@triton.jit
def finish_vector(
    total,
    other,
    squares,
    around,
    out,
    row,
    rows,
    bias_second: tl.int64,
    bias_third: tl.int64,
    eps,
    factor: tl.constexpr,
    form: tl.constexpr,
):
    """Sum a product over its columns, apply what `form` asks for, and store it: norm scale, row scale, bias, SiLU gate, residual.

    total and other (block_n, block_k) are the products, squares (block_k,) those of x. Each sum is multiplied by `factor`.
    """
    lines = row + tl.arange(0, form.block_n)
    spread = factor
    if form.norm:
        spread = factor * tl.rsqrt(tl.sum(squares, 0) / form.k_size + eps)
    result = tl.sum(total, 1) * spread
    if form.scaled:
        result *= tl.load(around.row_scale + lines)
    if form.bias:
        base, local = start_of(row, rows, bias_second, bias_third)
        result += tl.load(around.bias + base + local + tl.arange(0, form.block_n)).to(tl.float32)
    if form.gated:
        result = silu_times(result, tl.sum(other, 1) * spread, out)
    places = packed_place(lines, rows.all, form.out_packed)
    if form.residual:
        result = result.to(out.dtype.element_ty).to(tl.float32) + tl.load(around.residual + places).to(tl.float32)
    tl.store(out + places, result.to(out.dtype.element_ty))


@triton.jit
def plain_tile(start, columns, k_size, whole: tl.constexpr):
    """Load these columns of the rows that begin at `start`; zero beyond the last column."""
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
    around,
    out,
    rows,
    second: tl.int64,
    third: tl.int64,
    bias_second: tl.int64,
    bias_third: tl.int64,
    eps,
    form: tl.constexpr,
):
    """out = f(W · norm(x)); W in float32, bfloat16, float16, or int8 with a scale for each row; sums in float32.

    The next tile is loaded before the present one is multiplied.
    """
    block_n: tl.constexpr = form.block_n
    block_k: tl.constexpr = form.block_k
    k_size: tl.constexpr = form.k_size
    row = tl.program_id(0) * block_n
    base, local = start_of(row, rows, second, third)
    lines = local + tl.arange(0, block_n)
    start = w + base + lines[:, None].to(tl.int64) * k_size
    total = tl.zeros((block_n, block_k), tl.float32)
    other = tl.zeros((block_n, block_k), tl.float32)
    squares = tl.zeros((block_k,), tl.float32)
    columns = tl.arange(0, block_k)
    weights = plain_tile(start, columns, k_size, form.whole)
    up = plain_tile(start + second, columns, k_size, form.whole) if form.gated else weights
    wait_for_others(form.early)
    for k in tl.range(0, k_size, block_k):
        columns = k + tl.arange(0, block_k)
        inside = (columns < k_size) | form.whole
        after = columns + block_k
        next_weights = plain_tile(start, after, k_size, False)
        next_up = plain_tile(start + second, after, k_size, False) if form.gated else next_weights
        values = tl.load(x + packed_place(columns, k_size, form.x_packed), mask=inside, other=0.0).to(tl.float32)
        if form.norm:
            squares += values * values
            gains = tl.load(gain + packed_place(columns, k_size, form.x_packed), mask=inside, other=0.0)
            values *= gains.to(tl.float32)
        total += weights.to(tl.float32) * values[None, :]
        if form.gated:
            other += up.to(tl.float32) * values[None, :]
        weights, up = next_weights, next_up
    finish_vector(total, other, squares, around, out, row, rows, bias_second, bias_third, eps, 1.0, form)
