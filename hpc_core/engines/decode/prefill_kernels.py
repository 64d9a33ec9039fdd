"""Triton: the operations between the products of a prefill, one launch each. This module imports triton.

`turn_and_keep` has one program instance per token of the prompts, rows * width in all:

    query  (rows * width, heads * 2 half)      rotated in place
    key    (rows * width, groups * 2 half)     rotated, then written into  keys    (rows, groups, capacity, 2 half)
    value  (rows * width, groups * 2 half)     written into                values  (rows, groups, capacity, 2 half)

    one head:  | left half | right half |      rotation: left * cos - right * sin | right * cos + left * sin

`gate_in_place` has one program instance per `block` neighbouring elements: gate = SiLU(gate) * up.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from hpc_core.engines.decode.cache import LayerKeyValues
from hpc_core.engines.decode.model import Decoder
from hpc_core.engines.decode.prefill import Places, at_module
from hpc_core.engines.decode.products import launched
from hpc_core.engines.kernels.batch import norm_rows
from hpc_core.engines.kernels.vector import silu_times

_GATE_BLOCK = 2048


@triton.jit
def turned_halves(at, cos, sin, half: tl.constexpr, inside):
    """Return the rotated left and right halves, in float32, of heads whose left halves are at `at`."""
    left = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    cos_left, cos_right = tl.load(cos).to(tl.float32), tl.load(cos + half).to(tl.float32)
    sin_left, sin_right = tl.load(sin).to(tl.float32), tl.load(sin + half).to(tl.float32)
    return left * cos_left - right * sin_left, right * cos_right + left * sin_right


@triton.jit(do_not_specialize=["width"])  # or a prompt of another width would compile it again
def turn_and_keep(
    query,
    key,
    value,
    keys,
    values,
    cos,
    sin,
    first,
    width,
    capacity,
    heads: tl.constexpr,
    groups: tl.constexpr,
    heads_padded: tl.constexpr,
    groups_padded: tl.constexpr,
    half: tl.constexpr,
):
    """Rotate the query of one token in place; write its rotated key and its value to their place in the cache.

    query, key and value (rows · width, …); keys and values (rows, groups, capacity, 2 half); first (rows,) is where a row's prompt begins.
    """
    token = tl.program_id(0).to(tl.int64)
    row, place = token // width, token % width
    position = tl.maximum(place - tl.load(first + row), 0)
    lanes = tl.arange(0, half)[None, :]
    turn_cos, turn_sin = cos + position * 2 * half + lanes, sin + position * 2 * half + lanes

    head = tl.arange(0, heads_padded)[:, None]
    at = query + (token * heads + head) * 2 * half + lanes
    left, right = turned_halves(at, turn_cos, turn_sin, half, head < heads)
    dtype = keys.dtype.element_ty
    tl.store(at, left.to(dtype), mask=head < heads)
    tl.store(at + half, right.to(dtype), mask=head < heads)

    group = tl.arange(0, groups_padded)[:, None]
    own = (token * groups + group) * 2 * half + lanes
    left, right = turned_halves(key + own, turn_cos, turn_sin, half, group < groups)
    store = ((row * groups + group) * capacity + place) * 2 * half + lanes
    tl.store(keys + store, left.to(dtype), mask=group < groups)
    tl.store(keys + store + half, right.to(dtype), mask=group < groups)
    tl.store(values + store, tl.load(value + own, mask=group < groups, other=0.0).to(dtype), mask=group < groups)
    right_value = tl.load(value + own + half, mask=group < groups, other=0.0)
    tl.store(values + store + half, right_value.to(dtype), mask=group < groups)


@triton.jit
def gate_in_place(gate, up, count, block: tl.constexpr):
    """gate = SiLU(gate) · up, rounded where the plain path rounds."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    result = silu_times(tl.load(gate + at, mask=inside, other=0.0), tl.load(up + at, mask=inside, other=0.0), gate)
    tl.store(gate + at, result.to(gate.dtype.element_ty), mask=inside)


class KernelBetween:
    """`Between` by our own kernels."""

    def __init__(self, decoder: Decoder, turns: tuple[torch.Tensor, torch.Tensor]):
        self._decoder = decoder
        self._turns = turns

    def normed(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the RMS norm of x (tokens, hidden) by this module's weight."""
        x = x.contiguous()
        out = torch.empty_like(x)
        hidden = x.shape[1]
        block = triton.next_power_of_2(hidden)
        with at_module(norm):
            norm_rows[(len(x),)](
                x, norm.weight.detach(), out, hidden, self._decoder.eps, block=block, num_warps=8, **launched("none")
            )
        return out

    def keep(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kept: LayerKeyValues, places: Places
    ) -> None:
        """Rotate the query in place; store the rotated key and the value in the rows' cache."""
        decoder = self._decoder
        turn_and_keep[(len(query),)](
            query, key, value, kept.keys, kept.values, *self._turns, places.first, places.width, kept.keys.shape[2],
            heads=decoder.heads, groups=decoder.groups, heads_padded=triton.next_power_of_2(decoder.heads),
            groups_padded=triton.next_power_of_2(decoder.groups), half=decoder.head_width // 2, num_warps=4,
        )  # fmt: skip

    def gated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return SiLU(gate) · up, computed in place of the gate."""
        count = gate.numel()
        gate_in_place[(triton.cdiv(count, _GATE_BLOCK),)](gate, up, count, block=_GATE_BLOCK, num_warps=8)
        return gate
