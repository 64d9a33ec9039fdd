"""What a data path hands on: batches as arrays, one at a time by index. No tensors, no devices."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from hpc_core.builders.data.batching import EpochSize

__all__ = ["Block", "BlockSize", "BlockSource", "Ids"]

Ids = NDArray[np.int64]


class Block(NamedTuple):
    """One batch."""

    ids: Ids
    """(batch, width), padded with 0 on the right."""
    lengths: Ids
    """(batch,): real tokens of each row."""


class BlockSize(NamedTuple):
    """What is known of a batch without making it."""

    width: int
    """Tokens a row, padding included."""
    tokens: int
    """Real tokens."""
    padded: int
    """Padding tokens."""


class BlockSource(Protocol):
    """The batches of an epoch in order. Can be pickled, so that worker processes have it too."""

    tokenize: str
    """"cached" or "fetch", as in FeedSpec."""
    masked: bool
    """Whether the model is given a mask."""
    epoch: EpochSize
    sizes: list[BlockSize]
    """One a batch of the epoch."""

    def block(self, index: int) -> Block:
        """The batch at this index, made or read now."""
        ...
