"""How bitsandbytes stores 4-bit matrices, and what our kernels decode them with. Needs no triton.

Codes. A word holds eight 4-bit codes. They are looked up in registers, by byte permutes (PTX's `prmt`). A permute picks four of the eight bytes
in two words; its selector is four nibbles, and so are four codes. There are sixteen values, so one permute picks from values 0 to 7, a
second one from values 8 to 15, and a third one chooses between the two by the codes' highest bits. That gives one byte of four values;
a float16 or a bfloat16 has two bytes.

    codes & 0x7777  --prmt-->  byte of value 0..7   --+
                    --prmt-->  byte of value 8..15  --+--prmt by the highest bits-->  byte of the value

Constants. Each 64 weights share one, in float32 or quantized again to a byte. A byte stands for `code[byte] * outer + offset`: `code` has 256
values, `outer` is one for each 256 constants of a matrix, `offset` one for the matrix (bitsandbytes, `dequantize_blockwise` and
`QuantState.offset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.case.errors import BuildError
from hpc_core.engines.kernels.layout import pointer_offsets

_SELECTORS = """
.reg .b32 s, b, t, c, p, q, lo, hi;
and.b32 s, {codes}, 0x77777777;
shr.u32 b, {codes}, 1;
and.b32 b, b, 0x44444444;
or.b32 b, b, 0x32103210;
shr.u32 t, s, 16;
shr.u32 c, b, 16;"""
"""Selectors: `s` and `b` are for the first four codes, `t` and `c` for the last four. `s` and `t` pick one of eight values, `b` and `c` pick which
eight."""


def _bytes_of_four(select: str, which: str, tables: int) -> str:
    """Return PTX that puts the low bytes of four values into `lo` and the high bytes into `hi`; the tables are the operands from number `tables` on."""
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
"""Operand 0 (float32) is the sum of the eight values of the codes in one word (operand 1) times eight activations.

Operands 2 to 5 are the low bytes of the sixteen float16 values, 6 to 9 the high bytes, 10 to 13 the activations: two float16 a word,
the even one in the low half. The code of an even element lies in the high half of its byte, as bitsandbytes packs. Each half of `sum` adds
four products in float16, and each addition rounds by 2^-11 at most; an activation in bfloat16 has been rounded by 2^-9 already.
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
"""Operands 0 to 3 are the eight values of the codes in one word (operand 4), two a word, the even element's in the low half.

Operands 5 to 8 are the low bytes of the sixteen values in a type of two bytes, 9 to 12 the high bytes.
"""

TABLE_COPIES = 16


def byte_tables(values: torch.Tensor, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """Return sixteen values as eight int32 words on their device: the low bytes of values 0-3, 4-7, 8-11 and 12-15, then the high bytes.

    Raises:
        ValueError: an element of `dtype` does not have two bytes.
    """
    if dtype.itemsize != 2:
        raise ValueError(f"A byte table holds values of two bytes, and {dtype} has {dtype.itemsize}.")
    raw = values.detach().to(dtype).cpu().view(torch.uint8).view(16, 2)
    return torch.cat([raw[:, 0], raw[:, 1]]).contiguous().view(torch.int32).to(values.device)


def copied_tables(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return `byte_tables` with each word repeated: (8, TABLE_COPIES).

    Threads that load different copies keep them in their own registers. A single copy would be put into uniform registers, and every permute
    would have to move it out first: 453 instructions for eight words of codes instead of 292.
    """
    return byte_tables(values, dtype)[:, None].repeat(1, TABLE_COPIES)


_OUTER_BLOCK = 256


@dataclass(frozen=True)
class BlockConstants:
    """Block constants of up to three matrices with a common input."""

    each: tuple[torch.Tensor, ...]
    """For each matrix, a float32 or a byte for each 64 weights."""
    outer: tuple[torch.Tensor, ...] = ()
    """For each matrix, a float32 for each 256 bytes."""
    code: torch.Tensor | None = None
    """(256,) float32: the value of a byte."""
    offsets: torch.Tensor | None = None
    """(matrices,) float32: what is added to the value of each byte. A copy, since the kernels read them side by side."""

    @property
    def nested(self) -> bool:
        """Whether the constants are quantized again."""
        return self.code is not None

    def offsets_of_pointers(self) -> dict[str, int]:
        """Return the offsets, by name of the kernels' arguments, from the first matrix's constants to those of the second and third."""
        second, third = pointer_offsets(self.each)
        outer_second, outer_third = pointer_offsets(self.outer)
        return {
            "absmax_second": second,
            "absmax_third": third,
            "outer_second": outer_second,
            "outer_third": outer_third,
        }


def constants_of(states: Sequence[Any]) -> BlockConstants:
    """Return the block constants of matrices with these `quant_state`s of bitsandbytes.

    Raises:
        BuildError: some are quantized again and others not, or not in blocks of 256, or not by the same code.
    """
    nested = [bool(state.nested) for state in states]
    if not any(nested):
        return BlockConstants(tuple(state.absmax.float() for state in states))
    if not all(nested):
        raise BuildError(
            "engine='graph' multiplies layers with a common input (q, k and v; gate and up) together. The constants of some are quantized again and "
            "those of others are not: quantize all with the same double_quant, or say kernels='torch'."
        )
    sizes = sorted({int(state.state2.blocksize) for state in states})
    if sizes != [_OUTER_BLOCK]:
        raise BuildError(
            f"Our kernels read constants that are quantized again in blocks of {_OUTER_BLOCK}, these are in blocks of "
            f"{' and '.join(map(str, sizes))}: say kernels='torch'."
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
