"""The batches of a training program on its device: the protocol, and the batches that are all resident."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from hpc_core.builders.data.batching import BlockSize


@dataclass(frozen=True)
class DeviceBatch:
    """One batch on the device. ids and labels: (batch, width) int64; mask the same, or None without padding."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    tokens: int
    padded: int


class Batches(Protocol):
    """The batches of a program, by index and one after another."""

    other_threads: bool
    """True if threads of the data path call CUDA while a step runs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> DeviceBatch:
        """Return the batch at this index on the device, for inspection."""
        ...

    def __iter__(self) -> Iterator[DeviceBatch]: ...

    def clear(self) -> None:
        """Release every batch, and the processes and buffers behind them."""

    def size(self, index: int) -> BlockSize:
        """Width and tokens of this batch."""
        ...

    def held_bytes(self) -> int:
        """Bytes of the device that batches take."""
        ...

    def go_to(self, index: int) -> None:
        """Prepare for a `take` of this index: start whatever can run ahead."""

    def take(self, index: int) -> DeviceBatch:
        """Return the batch of the step that now begins. It is valid on the current stream until the next one is taken."""
        ...

    def taken(self) -> None:
        """Report that everything that reads the batch has been queued."""

    def by_index(self) -> contextlib.AbstractContextManager[None]:
        """Take batches by index within the block, with nothing running ahead, so that steps can be counted."""
        ...


class Resident(list[DeviceBatch]):
    """Every batch on the device before the first step."""

    other_threads = False

    def size(self, index: int) -> BlockSize:
        """Width and tokens of this batch."""
        batch = self[index]
        return BlockSize(batch.ids.shape[1], batch.tokens, batch.padded)

    def held_bytes(self) -> int:
        """Bytes of the device that batches take."""
        parts = [part for each in self for part in (each.ids, each.labels, each.mask) if part is not None]
        return sum(part.nbytes for part in parts)

    def go_to(self, index: int) -> None:
        """Do nothing: every batch is resident."""

    def take(self, index: int) -> DeviceBatch:
        """Return the batch at this index, modulo their number."""
        return self[index % len(self)]

    def taken(self) -> None:
        """Do nothing."""

    def by_index(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: batches are always taken by index."""
        return contextlib.nullcontext()
