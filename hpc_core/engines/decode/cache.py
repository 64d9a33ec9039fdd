"""The static KV cache: allocated once, with its counters on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc_core.engines.decode.model import Decoder

_SHARE = 128
"""Unused capacity is less than 1/128 of what is needed."""


def capacity_for(tokens: int, step: int) -> int:
    """Return the places a row needs for so many tokens, rounded up to a multiple of a step: at most `step`, and at most 1/128 of the tokens.

    Similar lengths then share shapes, and a short answer in a large batch does not pay for a long one. The multiple is a power of two or `step` itself.
    """
    fine = 1 << max(0, (tokens // _SHARE).bit_length() - 1)
    each = min(step, fine)
    return -(-tokens // each) * each


@dataclass(frozen=True)
class LayerKeyValues:
    """One layer's part, (batch, groups, capacity, head width) each."""

    keys: torch.Tensor
    values: torch.Tensor


class StaticKeyValues:
    """Keys and values of every layer, and the place where each row's prompt begins."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int):
        shape = (len(decoder.layers), 2, batch, decoder.groups, capacity, decoder.head_width)
        # One allocation: with one of some megabytes for each layer, torch's allocator would leave up to a megabyte unused behind every eleventh.
        self.whole = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        """(layers, keys and values, batch, groups, capacity, head width)."""
        self.layers = [LayerKeyValues(keys, values) for keys, values in self.whole]
        self.batch = batch
        self.capacity = capacity
        self.filled = torch.zeros(1, dtype=torch.int32, device=decoder.device)
        """(1,) places in use, the same for every row; each step adds one."""
        self.first = torch.zeros(batch, dtype=torch.int32, device=decoder.device)
        """Where a row's prompt begins: after its padding."""
        self.length = 0
        """The host's copy of `filled`, so that it need not wait for the device."""

    def begin(self, width: int, padding: torch.Tensor | None) -> None:
        """Begin a new prompt of `width` places, of which the first `padding` (batch,) of each row are padding."""
        self.filled.fill_(width)
        self.length = width
        if padding is None:
            self.first.zero_()
        else:
            self.first.copy_(padding)

    def get_seq_length(self) -> int:
        """Return the places in use, under the name that transformers' caches use."""
        return self.length
