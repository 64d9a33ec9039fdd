"""The batches of a training program on its device: by index and one after another, whoever brings them; here those that are all there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from hpc_core.builders.data.batching import BlockSize


@dataclass(frozen=True)
class DeviceBatch:
    """One batch on the device. ids and labels: (batch, width) int64; mask the same, or None where nothing is padded."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    tokens: int
    padded: int


class Batches(Protocol):
    """The batches of a program, by index and one after another."""

    other_threads: bool
    """Whether threads of the data path call CUDA while a step runs."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> DeviceBatch:
        """The batch at this index on the device, to look at."""
        ...

    def __iter__(self) -> Iterator[DeviceBatch]: ...

    def clear(self) -> None:
        """Let go of every batch and of whatever brings them."""

    def size(self, index: int) -> BlockSize:
        """Width and tokens of this batch."""
        ...

    def held_bytes(self) -> int:
        """Bytes of the device that batches take."""
        ...

    def go_to(self, index: int) -> None:
        """The next batch asked for will be this one; whatever can be done ahead for it is done now."""

    def take(self, index: int) -> DeviceBatch:
        """The batch of the step that now begins; valid on the current stream until the next is taken."""
        ...

    def taken(self) -> None:
        """Everything that reads the batch taken last has been queued."""

    def by_index(self) -> contextlib.AbstractContextManager[None]:
        """In the block batches come by index and nothing runs ahead, so that steps can be counted."""
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
        """Nothing to do: every batch is there."""

    def take(self, index: int) -> DeviceBatch:
        """The batch at this index, round and round."""
        return self[index % len(self)]

    def taken(self) -> None:
        """Nothing to do."""

    def by_index(self) -> contextlib.AbstractContextManager[None]:
        """They always do."""
        return contextlib.nullcontext()
