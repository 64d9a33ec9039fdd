"""Batches as tensors of the host, one after another without end, by torch's DataLoader."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from hpc_core.builders.data.batching import IGNORED_LABEL
from hpc_core.builders.data.blocks import BlockSource
from hpc_core.case.case import FeedSpec
from hpc_core.instruments.garbage import uncollected

__all__ = ["PREFETCHED", "HostBatch", "host_batch", "supply"]

PREFETCHED = 2
"""Batches that each worker has made or begun before they are asked for; torch's default, named because measuring must empty them."""


_PATIENCE_S = 60.0
"""So long a batch of a worker may take; then the loader says so, where it would wait for ever."""


class HostBatch(NamedTuple):
    """One batch in the host's memory. ids, labels and mask: (batch, width) int64; mask None where nothing is padded."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    place: int
    """Its index in the epoch."""
    maker: int
    """Number of the process that made it."""


def host_batch(source: BlockSource, index: int) -> HostBatch:
    """The batch at this index, made in this process now.

    Raises:
        IndexError: there is none.
    """
    block = source.block(index)
    ids = torch.from_numpy(block.ids)
    mask = torch.arange(ids.shape[1]).unsqueeze(0) < torch.from_numpy(block.lengths).unsqueeze(1)
    labels = ids.masked_fill(~mask, IGNORED_LABEL)
    return HostBatch(ids, labels, mask.long() if source.masked else None, index, os.getpid())


class _Indexed(Dataset[HostBatch]):
    def __init__(self, source: BlockSource):
        self._source = source

    def __getitem__(self, index: int) -> HostBatch:
        return host_batch(self._source, index)


class _Round(Sampler[int]):
    """0, 1 … count - 1, and from the beginning again."""

    def __init__(self, count: int):
        self._count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(self._count)


def supply(source: BlockSource, feed: FeedSpec, count: int, *, on_gpu: bool) -> Iterator[HostBatch]:
    """The first `count` batches round and round, from batch 0, as the feed says. Worker processes end when it is let go of.

    Pinning needs a GPU: without one batches come unpinned, and say so themselves (`is_pinned`). A worker that takes more than a minute
    for a batch ends the iteration with torch's RuntimeError.
    """
    workers = feed.workers
    loader = DataLoader(
        _Indexed(source),
        batch_size=None,  # an item is a batch already
        sampler=_Round(count),
        num_workers=workers,
        pin_memory=feed.pinned and on_gpu,
        prefetch_factor=PREFETCHED if workers else None,
        # A child that is forked touches no CUDA and need not import what its parent has.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else the loader draws its seed from the stream that dropout draws from
        timeout=_PATIENCE_S if workers else 0,
        worker_init_fn=_leave_the_parents_garbage if workers else None,
    )
    with warnings.catch_warnings(), uncollected():  # a child forked here collects nothing either
        # Python 3.12 warns of every fork beside other threads. These children read a file or texts, and run torch on one thread.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        return iter(loader)


def _leave_the_parents_garbage(_: int) -> None:
    """In a worker: what came with the fork is never collected there. Events and graphs among it would call CUDA, which after a fork fails or hangs."""
    gc.freeze()
    gc.enable()
