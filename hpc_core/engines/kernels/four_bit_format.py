"""Four-bit codes times activations without a table in memory: PTX byte permutes, and the bytes that they pick from. Needs no triton.

A selector of `prmt` is four nibbles, as four codes are. Eight of the sixteen values fit one permute (two words of four bytes), so each byte
of four results takes two permutes and a third that picks by the codes' highest bits. Two bytes make a float16, or a bfloat16.


The constants of 4-bit matrices, one for each 64 weights, read where bitsandbytes keeps them: in float32, or quantized again to a byte each.

Quantized again, a constant is `code[byte] * outer + offset`: `code` has 256 values, `outer` is one for each 256 constants of a matrix, `offset` one
for the matrix (bitsandbytes, `dequantize_blockwise` and `QuantState.offset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.case.errors import BuildError
from hpc_core.engines.kernels.layout import distances

_SELECTORS = """
.reg .b32 s, b, t, c, p, q, lo, hi;
and.b32 s, {codes}, 0x77777777;
shr.u32 b, {codes}, 1;
and.b32 b, b, 0x44444444;
or.b32 b, b, 0x32103210;
shr.u32 t, s, 16;
shr.u32 c, b, 16;"""
"""Of eight codes: which of eight values, `s` of the first four and `t` of the others, and which eight, `b` and `c`."""


def _bytes_of_four(select: str, which: str, tables: int) -> str:
    """Low bytes of four values in `lo`, high ones in `hi`; the tables are operands from number `tables` on."""
    at = [f"${tables + number}" for number in range(8)]
    return f"""
prmt.b32 p, {at[0]}, {at[1]}, {select};
prmt.b32 q, {at[2]}, {at[3]}, {select};
prmt.b32 lo, p, q, {which};
prmt.b32 p, {at[4]}, {at[5]}, {select};
prmt.b32 q, {at[6]}, {at[7]}, {select};
prmt.b32 hi, p, q, {which};"""


def _two_products(first: str, last: str) -> str:
    return f"""
prmt.b32 w, lo, hi, 0x4051;
{first};
prmt.b32 w, lo, hi, 0x6273;
fma.rn.f16x2 sum, w, {last}, sum;"""


EIGHT_PRODUCTS = (
    "{"
    + _SELECTORS.format(codes="$1")
    + """
.reg .b32 w, sum;
.reg .b16 h0, h1;
.reg .f32 f0, f1;"""
    + _bytes_of_four("s", "b", 2)
    + _two_products("mul.rn.f16x2 sum, w, $10", "$11")
    + _bytes_of_four("t", "c", 2)
    + _two_products("fma.rn.f16x2 sum, w, $12, sum", "$13")
    + """
mov.b32 {h0, h1}, sum;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
add.f32 $0, f0, f1;
}"""
)
"""The sum (operand 0, float32) of eight values, named by the codes of one word (operand 1), times eight activations.

Operands 2 to 5 are the low bytes of the sixteen float16 values, 6 to 9 the high ones, 10 to 13 the activations, two float16 a word,
the even one in its low half. The code of an even element lies in the high half of its byte, as bitsandbytes packs. Four products a half
are summed in float16: each rounds by 2^-11 at most, where an activation in bfloat16 was rounded by 2^-9.
"""

EIGHT_VALUES = (
    "{"
    + _SELECTORS.format(codes="$4")
    + _bytes_of_four("s", "b", 5)
    + """
prmt.b32 $0, lo, hi, 0x4051;
prmt.b32 $1, lo, hi, 0x6273;"""
    + _bytes_of_four("t", "c", 5)
    + """
prmt.b32 $2, lo, hi, 0x4051;
prmt.b32 $3, lo, hi, 0x6273;
}"""
)
"""The eight values (operands 0 to 3, two a word, the even element's in its low half) that the codes of one word (operand 4) name.

Operands 5 to 8 are the low bytes of the sixteen values in a type of two bytes, 9 to 12 the high ones.
"""

TABLE_COPIES = 16


def byte_tables(values: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Sixteen values in a `dtype` of two bytes as eight words: low bytes of values 0-3, 4-7, 8-11, 12-15, then the high bytes; int32, on their device.

    Raises:
        ValueError: `dtype` has not two bytes.
    """
    if dtype.itemsize != 2:
        raise ValueError(f"A byte table holds values of two bytes, not of {dtype}.")
    raw = values.detach().to(dtype).cpu().view(torch.uint8).view(16, 2)
    return torch.cat([raw[:, 0], raw[:, 1]]).contiguous().view(torch.int32).to(values.device)


def copied_tables(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(8, TABLE_COPIES): `byte_tables`, each word as often.

    A kernel whose threads load different copies keeps them in registers of its threads. One copy for all would be put into uniform
    registers, out of which every permute would first have to move it: 453 instructions for eight words of codes, and not 292.
    """
    return byte_tables(values, dtype)[:, None].repeat(1, TABLE_COPIES)


_OUTER_BLOCK = 256


@dataclass(frozen=True)
class BlockConstants:
    """Those of up to three matrices with a common input."""

    each: tuple[torch.Tensor, ...]
    """By matrix, a float32 or a byte for each 64 weights."""
    outer: tuple[torch.Tensor, ...] = ()
    """By matrix, a float32 for each 256 bytes."""
    code: torch.Tensor | None = None
    """(256,) float32: what a byte stands for."""
    offsets: torch.Tensor | None = None
    """(matrices,) float32, our own copy."""

    @property
    def nested(self) -> bool:
        """Whether they are quantized again."""
        return self.code is not None

    def arguments(self, dummy: torch.Tensor) -> dict[str, Any]:
        """Of a launch; `dummy` stands for what is not there."""
        second, third = distances(self.each)
        outer_second, outer_third = distances(self.outer)
        return {
            "absmax": self.each[0],
            "absmax_second": second,
            "absmax_third": third,
            "outer": self.outer[0] if self.outer else dummy,
            "outer_second": outer_second,
            "outer_third": outer_third,
            "code": dummy if self.code is None else self.code,
            "offsets": dummy if self.offsets is None else self.offsets,
            "nested": self.nested,
        }


def constants_of(states: Sequence[Any]) -> BlockConstants:
    """Of these matrices' `quant_state`s.

    Raises:
        BuildError: some are quantized again and some are not, or not by 256 at a time, or not by the same code.
    """
    nested = [bool(state.nested) for state in states]
    if not any(nested):
        return BlockConstants(tuple(state.absmax.float() for state in states))
    if not all(nested):
        raise BuildError(
            "engine='graph' takes layers with a common input (q, k and v; gate and up) together, and the constants of some are quantized again and of "
            "others not: quantize all with the same double_quant, or say kernels='torch'."
        )
    sizes = sorted({int(state.state2.blocksize) for state in states})
    if sizes != [_OUTER_BLOCK]:
        raise BuildError(
            f"Our kernels read constants that are quantized again by {_OUTER_BLOCK}, these are by {' and '.join(map(str, sizes))}: say kernels='torch'."
        )
    code = states[0].state2.code
    if not all(torch.equal(code, state.state2.code) for state in states[1:]):
        raise BuildError(
            "The constants of layers with a common input are quantized by different codes: say kernels='torch'."
        )
    return BlockConstants(
        each=tuple(state.absmax for state in states),
        outer=tuple(state.state2.absmax.float() for state in states),
        code=code.float(),
        offsets=torch.stack([state.offset.float().reshape(()) for state in states]),
    )
