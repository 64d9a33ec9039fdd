"""Four-bit codes to numbers on the device without memory: PTX byte permutes, and the tables that they pick from. Needs no triton.

A selector of `prmt` is four nibbles, as four codes are. Eight of the sixteen values fit one permute (two words of four bytes), so each byte
of four results takes two permutes and a third that picks by the codes' highest bits.
"""

from __future__ import annotations

import torch

__all__ = ["EIGHT_CODES", "byte_tables"]

EIGHT_CODES = """
{
.reg .b32 s, b, s2, b2, p, q, lo, hi, w;
.reg .b16 h0, h1;
and.b32 s, $8, 0x77777777;
shr.u32 b, $8, 1;
and.b32 b, b, 0x44444444;
or.b32 b, b, 0x32103210;
shr.u32 s2, s, 16;
shr.u32 b2, b, 16;
prmt.b32 p, $9, $10, s;
prmt.b32 q, $11, $12, s;
prmt.b32 lo, p, q, b;
prmt.b32 p, $13, $14, s;
prmt.b32 q, $15, $16, s;
prmt.b32 hi, p, q, b;
prmt.b32 w, lo, hi, 0x5140;
mov.b32 {h0, h1}, w;
cvt.f32.f16 $1, h0;
cvt.f32.f16 $0, h1;
prmt.b32 w, lo, hi, 0x7362;
mov.b32 {h0, h1}, w;
cvt.f32.f16 $3, h0;
cvt.f32.f16 $2, h1;
prmt.b32 p, $9, $10, s2;
prmt.b32 q, $11, $12, s2;
prmt.b32 lo, p, q, b2;
prmt.b32 p, $13, $14, s2;
prmt.b32 q, $15, $16, s2;
prmt.b32 hi, p, q, b2;
prmt.b32 w, lo, hi, 0x5140;
mov.b32 {h0, h1}, w;
cvt.f32.f16 $5, h0;
cvt.f32.f16 $4, h1;
prmt.b32 w, lo, hi, 0x7362;
mov.b32 {h0, h1}, w;
cvt.f32.f16 $7, h0;
cvt.f32.f16 $6, h1;
}
"""
"""One word (operand 8) to eight float32 (operands 0 to 7), its elements in order.

Operands 9 to 12 are the low bytes of the sixteen float16 values, 13 to 16 the high ones. The code of an even element lies in
the high half of its byte, as bitsandbytes packs.
"""


def byte_tables(values: torch.Tensor) -> torch.Tensor:
    """Sixteen values in float16 as eight words: low bytes of values 0-3, 4-7, 8-11, 12-15, then the high bytes; int32, on their device."""
    raw = values.detach().half().cpu().view(torch.uint8).view(16, 2)
    return torch.cat([raw[:, 0], raw[:, 1]]).contiguous().view(torch.int32).to(values.device)
