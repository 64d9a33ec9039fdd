"""The assembly that looks up and multiplies 4-bit codes, interpreted without a GPU."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.engines.kernels.four_bit_format import EIGHT_PRODUCTS, EIGHT_VALUES, byte_tables, copied_tables

VALUES = torch.tensor([-1, -0.7, -0.5, -0.4, -0.3, -0.2, -0.1, 0, 0.08, 0.16, 0.25, 0.34, 0.44, 0.56, 0.72, 1]).half()
_UNSIGNED = {"and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b, "shr.u32": lambda a, b: a >> b}


def _permuted_bytes(low: int, high: int, selector: int) -> int:
    """PTX's `prmt.b32` in its default mode, for selectors without the sign bit."""
    source = low.to_bytes(4, "little") + high.to_bytes(4, "little")
    picks = [selector >> 4 * at & 15 for at in range(4)]
    assert max(picks) < 8
    return int.from_bytes(bytes(source[pick] for pick in picks), "little")


def _halves(word: int) -> np.ndarray:
    return np.frombuffer(word.to_bytes(4, "little"), dtype=np.float16)


def _multiply_add(name: str, factors: list[int]) -> int:
    """`mul` and `fma` of two float16 per word, rounded once."""
    first, second, *third = (_halves(word).astype(np.float64) for word in factors)
    assert bool(third) == name.startswith("fma")
    return int.from_bytes((first * second + (third[0] if third else 0)).astype(np.float16).tobytes(), "little")


def _interpreted(assembly: str, first: int, operands: list[int]) -> dict[str, int]:
    """Registers and operands after the assembly, whose inputs are operands from number `first` on."""
    registers: dict[str, int] = {f"${at}": operand for at, operand in enumerate(operands, start=first)}
    for line in assembly.strip()[1:-1].split(";"):
        name, *names = re.findall(r"[.\w$]+", line) or [".reg"]
        if name == ".reg" or name.startswith("cvt"):
            continue
        if name == "add.f32":
            total = np.float32(_halves(registers["sum"])[0]) + np.float32(_halves(registers["sum"])[1])
            registers[names[0]] = int(np.float32(total).view(np.uint32))
            continue
        values = [registers[one] if one in registers else int(one, 0) for one in names[1:] if name != "mov.b32"]
        if name.endswith("f16x2"):
            registers[names[0]] = _multiply_add(name, values)
        elif name == "prmt.b32":
            registers[names[0]] = _permuted_bytes(*values)
        elif name != "mov.b32":
            registers[names[0]] = _UNSIGNED[name](*values)
    return registers


def _packed_codes(codes: list[int]) -> int:
    """Eight codes packed as bitsandbytes packs them, high half first."""
    return int.from_bytes(bytes(even << 4 | odd for even, odd in zip(codes[::2], codes[1::2], strict=True)), "little")


@given(
    codes=st.lists(st.integers(0, 15), min_size=8, max_size=8),
    activations=st.lists(st.floats(-8, 8, width=16), min_size=8, max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_codes_are_multiplied_by_their_activations(codes: list[int], activations: list[float]) -> None:
    """Packed codes times activations give the sum of their products."""
    tables = [int(table) & 0xFFFFFFFF for table in byte_tables(VALUES).tolist()]
    words = np.array(activations, dtype=np.float16).view(np.uint32).tolist()
    products = [float(VALUES[code]) * value for code, value in zip(codes, activations, strict=True)]
    registers = _interpreted(EIGHT_PRODUCTS, 1, [_packed_codes(codes), *tables, *words])
    total = float(np.uint32(registers["$0"]).view(np.float32))
    assert total == pytest.approx(sum(products), abs=2**-9 * sum(map(abs, products)) + 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(codes=st.lists(st.integers(0, 15), min_size=8, max_size=8))
@settings(max_examples=50, deadline=None)
def test_each_code_becomes_its_value(dtype: torch.dtype, codes: list[int]) -> None:
    """Each code becomes its value, exactly as the dtype represents it, in order."""
    tables = [int(table) & 0xFFFFFFFF for table in byte_tables(VALUES, dtype).tolist()]
    registers = _interpreted(EIGHT_VALUES, 4, [_packed_codes(codes), *tables])
    words = b"".join(registers[f"${at}"].to_bytes(4, "little") for at in range(4))
    assert torch.equal(torch.frombuffer(bytearray(words), dtype=dtype), VALUES.to(dtype)[codes])


def test_every_copy_of_a_table_is_the_table() -> None:
    """All copies of a table, from which threads load, are equal."""
    copies = copied_tables(VALUES, torch.bfloat16)
    assert all(torch.equal(copy, byte_tables(VALUES, torch.bfloat16)) for copy in copies.T)
