"""Four-bit codes times activations without a table in memory: PTX byte permutes, and the bytes that they pick from. Needs no triton.

A selector of `prmt` is four nibbles, as four codes are. Eight of the sixteen values fit one permute (two words of four bytes), so each byte
of four results takes two permutes and a third that picks by the codes' highest bits. Two bytes make a float16.
"""

from __future__ import annotations

import torch

__all__ = ["EIGHT_PRODUCTS", "byte_tables"]

_FOUR = """
prmt.b32 p, $2, $3, {s};
prmt.b32 q, $4, $5, {s};
prmt.b32 lo, p, q, {b};
prmt.b32 p, $6, $7, {s};
prmt.b32 q, $8, $9, {s};
prmt.b32 hi, p, q, {b};
prmt.b32 w, lo, hi, 0x4051;
{first};
prmt.b32 w, lo, hi, 0x6273;
fma.rn.f16x2 sum, w, {last}, sum;
"""

EIGHT_PRODUCTS = (
    """{
.reg .b32 s, b, t, c, p, q, lo, hi, w, sum;
.reg .b16 h0, h1;
.reg .f32 f0, f1;
and.b32 s, $1, 0x77777777;
shr.u32 b, $1, 1;
and.b32 b, b, 0x44444444;
or.b32 b, b, 0x32103210;
shr.u32 t, s, 16;
shr.u32 c, b, 16;"""
    + _FOUR.format(s="s", b="b", first="mul.rn.f16x2 sum, w, $10", last="$11")
    + _FOUR.format(s="t", b="c", first="fma.rn.f16x2 sum, w, $12, sum", last="$13")
    + """mov.b32 {h0, h1}, sum;
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


def byte_tables(values: torch.Tensor) -> torch.Tensor:
    """Sixteen values in float16 as eight words: low bytes of values 0-3, 4-7, 8-11, 12-15, then the high bytes; int32, on their device."""
    raw = values.detach().half().cpu().view(torch.uint8).view(16, 2)
    return torch.cat([raw[:, 0], raw[:, 1]]).contiguous().view(torch.int32).to(values.device)
