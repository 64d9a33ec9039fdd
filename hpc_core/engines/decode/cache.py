"""The engine's KV cache: made once, with its counters on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc_core.engines.decode.model import Decoder

_SHARE = 128
"""Room beyond what is needed is less than such a share of it."""


def capacity_for(tokens: int, step: int) -> int:
    """Places a row for so many tokens, rounded up in steps of at most `step`, and of at most a 128th of what is needed.

    Lengths near each other meet the same shapes, and a short answer under a large batch does not pay for a long one: a step is a power of two, or `step` itself.
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
    """Keys and values of every layer, and where each row's prompt begins."""

    def __init__(self, decoder: Decoder, batch: int, capacity: int):
        shape = (len(decoder.layers), 2, batch, decoder.groups, capacity, decoder.head_width)
        # One allocation: of some megabytes each, torch's allocator would leave up to one unused behind every eleventh.
        self.whole = torch.zeros(shape, dtype=decoder.dtype, device=decoder.device)
        """(layers, keys and values, batch, groups, capacity, head width)."""
        self.layers = [LayerKeyValues(keys, values) for keys, values in self.whole]
        self.batch = batch
        self.capacity = capacity
        self.filled = torch.zeros(1, dtype=torch.int32, device=decoder.device)
        """Places in use, of every row alike; counted up by each step."""
        self.first = torch.zeros(batch, dtype=torch.int32, device=decoder.device)
        """Where a row's prompt begins: after its padding."""
        self.length = 0
        """`filled` as the host knows it without asking the device."""

    def begin(self, width: int, padding: torch.Tensor | None) -> None:
        """A new prompt of `width` places, of which the first `padding` (batch,) of each row are padding."""
        self.filled.fill_(width)
        self.length = width
        if padding is None:
            self.first.zero_()
        else:
            self.first.copy_(padding)

    def get_seq_length(self) -> int:
        """Places in use, as transformers' caches say it."""
        return self.length
