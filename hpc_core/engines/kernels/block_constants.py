"""The constants of 4-bit matrices, one for each 64 weights, read where bitsandbytes keeps them: in float32, or quantized again to a byte each.

Quantized again, a constant is `code[byte] * outer + offset`: `code` has 256 values, `outer` is one for each 256 constants of a matrix, `offset` one
for the matrix (bitsandbytes, `dequantize_blockwise` and `QuantState.offset`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.case.errors import BuildError
from hpc_core.engines.kernels.pointer_offsets import distances

__all__ = ["BlockConstants", "constants_of"]

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
