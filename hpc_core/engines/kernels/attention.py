"""Triton: attention of one new token over the filled part of a static cache, split over the keys (flash decoding).

    qkv     (batch, (heads + 2 * groups) * width)      one row: | queries of group 0 | ... | keys | values |
    keys    (batch, groups, capacity, width)           values likewise

    one row of one group:   | padding | prompt and earlier tokens | new token | free |
    place                   0         first                       filled      filled + 1 ... capacity
                                      |  part 0  |  part 1  | ...

`attend_part`: one program instance computes one part of the places for the query heads of one group, which share keys and values. Part 0 also
stores the new token's key and value. `join_parts`: one program instance joins the parts of one head.

`filled` is read on the device, so one captured launch serves every length.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hpc_core.engines.kernels.vector import packed_place, wait_for_others


@triton.jit
def rotated(at, partner, sign, cos, sin, inside):
    """Return the rotary embedding of the values at these places: x · cos + (x with its halves swapped) · sign · sin."""
    plain = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    swapped = tl.load(partner, mask=inside, other=0.0).to(tl.float32)
    return plain * cos + sign * swapped * sin


@triton.jit
def attend_part(
    qkv,
    cos,
    sin,
    keys,
    values,
    first,
    filled,
    highest,
    weight,
    mixed,
    scale,
    capacity,
    heads_form: tl.constexpr,
    early: tl.constexpr,
):
    """Attend with one group of query heads to one part of the cache; part 0 also stores the new token's key and value, and attends to it.

    cos and sin (capacity, width); first (batch,) is where a row's prompt begins; filled (1,) counts the places of earlier tokens.
    For each (batch, head, part) it stores the highest score, the sum of the softmax's weights relative to that score, and the sum of the
    values with these weights.
    """
    groups: tl.constexpr = heads_form.groups
    shared: tl.constexpr = heads_form.shared
    shared_padded: tl.constexpr = heads_form.shared_padded
    width: tl.constexpr = heads_form.width
    parts: tl.constexpr = heads_form.parts
    block: tl.constexpr = heads_form.block
    item, group, part = tl.program_id(0) // groups, tl.program_id(0) % groups, tl.program_id(1)
    old = tl.load(filled)
    begin = tl.load(first + item)
    position = old - begin
    heads = tl.arange(0, shared_padded)
    lanes = tl.arange(0, width)
    swap = (lanes + width // 2) % width
    sign = tl.where(lanes < width // 2, -1.0, 1.0)
    turn_cos = tl.load(cos + position * width + lanes)
    turn_sin = tl.load(sin + position * width + lanes)
    wait_for_others(early)
    line = qkv + item * (groups * shared + 2 * groups) * width
    row = line + (group * shared + heads)[:, None] * width
    real = (heads < shared)[:, None] & (lanes >= 0)[None, :]
    query = rotated(
        row + lanes[None, :], row + swap[None, :], sign[None, :], turn_cos[None, :], turn_sin[None, :], real
    )
    dtype = keys.dtype.element_ty
    query = query.to(dtype)
    store = (item * groups + group).to(tl.int64) * capacity * width
    top = tl.full((shared_padded,), float("-inf"), tl.float32)
    total = tl.zeros((shared_padded,), tl.float32)
    mix = tl.zeros((shared_padded, width), tl.float32)
    if part == 0:
        own = line + (groups * shared + group) * width
        key = rotated(own + lanes, own + swap, sign, turn_cos, turn_sin, lanes >= 0).to(dtype)
        value = tl.load(line + (groups * shared + groups + group) * width + lanes).to(dtype)
        tl.store(keys + store + old * width + lanes, key)
        tl.store(values + store + old * width + lanes, value)
        top = tl.sum(query.to(tl.float32) * key.to(tl.float32)[None, :], 1) * scale
        total = tl.full((shared_padded,), 1.0, tl.float32)
        mix = tl.zeros((shared_padded, width), tl.float32) + value.to(tl.float32)[None, :]
    span = tl.cdiv(tl.cdiv(old, parts), block) * block
    low = tl.maximum(part * span, begin // block * block)
    high = tl.minimum((part + 1) * span, old)
    for at in tl.range(low, high, block):
        places = at + tl.arange(0, block)
        visible = (places < high) & (places >= begin)
        grid = store + places[:, None] * width + lanes[None, :]
        key = tl.load(keys + grid, mask=visible[:, None], other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        score = tl.where(visible[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        fade = tl.exp(top - safe)
        share = tl.exp(score - safe[:, None])
        value = tl.load(values + grid, mask=visible[:, None], other=0.0)
        mix = mix * fade[:, None] + tl.dot(share.to(dtype), value, input_precision="ieee")
        total = total * fade + tl.sum(share, 1)
        top = new_top
    place = (item * groups * shared + group * shared + heads) * parts + part
    tl.store(highest + place, top, mask=heads < shared)
    tl.store(weight + place, total, mask=heads < shared)
    tl.store(mixed + place[:, None] * width + lanes[None, :], mix, mask=real)


@triton.jit
def join_parts(
    highest,
    weight,
    mixed,
    out,
    heads,
    packed: tl.constexpr,
    width: tl.constexpr,
    parts: tl.constexpr,
    early: tl.constexpr,
):
    """Write one head of out (batch, heads · width): the sum of its parts, after each is rescaled to the highest score of all parts."""
    wait_for_others(early)
    row = tl.program_id(0)
    item, head = row // heads, row % heads
    every, lanes = tl.arange(0, parts), tl.arange(0, width)
    tops = tl.load(highest + row * parts + every)
    fade = tl.exp(tops - tl.max(tops, 0))
    total = tl.sum(tl.load(weight + row * parts + every) * fade, 0)
    mix = tl.sum(tl.load(mixed + (row * parts + every)[:, None] * width + lanes[None, :]) * fade[:, None], 0)
    place = packed_place(head * width + lanes, heads * width, packed)
    tl.store(out + item * heads * width + place, (mix / total).to(out.dtype.element_ty))
