"""The byte permutes that look 4-bit codes up, played through without a GPU."""

from __future__ import annotations

import re
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.engine.code_lookup import EIGHT_CODES, byte_tables

VALUES = torch.linspace(-1, 1, 16).half()
_UNSIGNED = {"and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b, "shr.u32": lambda a, b: a >> b}


def _permuted(low: int, high: int, selector: int) -> int:
    """PTX's `prmt.b32` in its default mode, for selectors without the sign bit."""
    source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    picks = [selector >> 4 * at & 15 for at in range(4)]
    assert max(picks) < 8
    return int.from_bytes(bytes(source[pick] for pick in picks), "little")


def _played(word: int, tables: list[int]) -> list[float]:
    """The assembly on one word."""
    held: dict[str, int | float] = {"$8": word, **{f"${9 + at}": table for at, table in enumerate(tables)}}
    for line in EIGHT_CODES.strip().strip("{}").strip().split(";"):
        parts = re.findall(r"[.\w$]+", line)
        if not parts or parts[0] == ".reg":
            continue
        name, *names = parts
        values = [int(held[one]) if one in held else int(one, 0) for one in names[1 + (name == "mov.b32") :]]
        if name == "mov.b32":
            held[names[0]], held[names[1]] = values[0] & 0xFFFF, values[0] >> 16
        elif name == "cvt.f32.f16":
            held[names[0]] = struct.unpack("<e", values[0].to_bytes(2, "little"))[0]
        else:
            held[names[0]] = _permuted(*values) if name == "prmt.b32" else _UNSIGNED[name](*values)
    return [float(held[f"${at}"]) for at in range(8)]


@given(codes=st.lists(st.integers(0, 15), min_size=8, max_size=8))
@settings(max_examples=50, deadline=None)
def test_each_code_becomes_its_value_in_its_place(codes: list[int]) -> None:
    """Eight codes packed as bitsandbytes packs them, high half first, come out as their eight values in order."""
    packed = bytes(even << 4 | odd for even, odd in zip(codes[::2], codes[1::2], strict=True))
    tables = [int(table) & 0xFFFFFFFF for table in byte_tables(VALUES).tolist()]
    assert _played(int.from_bytes(packed, "little"), tables) == pytest.approx([float(VALUES[code]) for code in codes])
