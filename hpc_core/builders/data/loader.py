"""Batches fed to a training program by torch's DataLoader while it runs: the same as resident ones, in the same order.

They are copied into buffers that are made once, so a step allocates nothing for them. A buffer is written again only after the step that
read it: the device's streams wait for each other by events, and the host never waits.
"""

from __future__ import annotations

import contextlib
import gc
import os
import time
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, Dataset, Sampler

from hpc_core.builders.data.batching import IGNORED_LABEL, BlockSize, BlockSource
from hpc_core.builders.data.device_batches import DeviceBatch
from hpc_core.case.workloads import FeedSpec
from hpc_core.instruments.garbage import uncollected

PREFETCHED = 2
"""Batches that each worker makes ahead. torch's default, named here because measuring must empty them."""
_PATIENCE_S = 60.0
"""Seconds that a worker may take for a batch before the loader raises. Without it the loader would wait for ever."""


class HostBatch(NamedTuple):
    """One batch in host memory. ids, labels and mask: (batch, width) int64; mask None without padding."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor | None
    place: int
    """Its index in the epoch."""
    maker: int
    """The id of the process that made it."""


def host_batch(source: BlockSource, index: int) -> HostBatch:
    """Make the batch at this index in this process.

    Raises:
        IndexError: there is no such batch.
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
    """0, 1 … count - 1, repeated without end."""

    def __init__(self, count: int):
        self._count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from range(self._count)


def supply(source: BlockSource, feed: FeedSpec, count: int, *, on_gpu: bool) -> Iterator[HostBatch]:
    """Return an endless iterator over the first `count` batches, from batch 0. Worker processes end when it is garbage-collected.

    Pinning needs a GPU: without one, batches are not pinned (`is_pinned` reports it). If a worker takes more than a minute for a batch,
    torch raises a RuntimeError.
    """
    workers = feed.workers
    loader = DataLoader(
        _Indexed(source),
        batch_size=None,  # an item is a batch already
        sampler=_Round(count),
        num_workers=workers,
        pin_memory=feed.pinned and on_gpu,
        prefetch_factor=PREFETCHED if workers else None,
        # A forked child does not call CUDA, and need not import what its parent has imported.
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # otherwise the loader takes its seed from the generator that dropout uses
        timeout=_PATIENCE_S if workers else 0,
        worker_init_fn=_leave_the_parents_garbage if workers else None,
    )
    with warnings.catch_warnings(), uncollected():  # a child forked here does not collect either
        # Python 3.12 warns about every fork in a process with threads. These children read files or texts, and run torch on one thread.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        return iter(loader)


def _leave_the_parents_garbage(_: int) -> None:
    """Never collect inherited objects in a worker: CUDA events and graphs among them would call CUDA, which fails or hangs after a fork."""
    gc.freeze()
    gc.enable()


@dataclass
class FeedObservations:
    """What was observed of a feed since its last `go_to`."""

    fetched_ns: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of the host's wait for each batch, by `time.time_ns`."""
    copied_ns: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of queueing each copy, which takes long if memory is not pinned."""
    makers: set[int] = field(default_factory=set)
    pinned: set[bool] = field(default_factory=set)
    ahead: set[int] = field(default_factory=set)
    """How many batches were queued for the device when a step requested its own."""


class _Slot:
    """Device buffers for one batch of any width."""

    def __init__(self, rows: int, width: int, device: torch.device, *, masked: bool):
        self._rows = rows
        self._parts = [torch.zeros(rows * width, dtype=torch.long, device=device) for _ in range(2 + masked)]
        self._views: dict[int, list[torch.Tensor]] = {}
        self.filled = torch.cuda.Event() if device.type == "cuda" else None
        self.used = torch.cuda.Event() if device.type == "cuda" else None
        self.index = -1
        """The index of the batch that it contains."""

    def fill(self, host: HostBatch, size: BlockSize) -> None:
        """Copy a batch in, on the current stream. torch keeps pinned memory until the copy ends, and stages other memory before this returns."""
        views = self._views_of(size.width)
        for target, part in zip(views, (host.ids, host.labels, host.mask), strict=False):
            assert part is not None
            target.copy_(part, non_blocking=True)
        self.index = host.place
        self.batch = DeviceBatch(views[0], views[1], views[2] if len(views) > 2 else None, size.tokens, size.padded)

    def _views_of(self, width: int) -> list[torch.Tensor]:
        if width not in self._views:
            with _disable_current_modes():  # made once, so no step counts them
                self._views[width] = [part[: self._rows * width].view(self._rows, width) for part in self._parts]
        return self._views[width]

    def nbytes(self) -> int:
        return sum(part.nbytes for part in self._parts)


class Fed:
    """Batches that come one by one from a DataLoader. A request out of order fetches and drops the batches in between."""

    def __init__(self, source: BlockSource, feed: FeedSpec, count: int, device: torch.device, note: str):
        """Feed the first `count` batches of the source. `note` says where the source came from."""
        self.source, self.feed, self.device, self.note = source, feed, device, note
        self.observed = FeedObservations()
        self.other_threads = feed.pinned and feed.workers > 0
        self._count = count
        self._supply: Iterator[HostBatch] | None = None
        self._next = 0
        self._by_index = False
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and feed.ahead else None
        width = max(source.sizes[index].width for index in range(count))
        rows = source.block(0).ids.shape[0]
        self._free = deque(_Slot(rows, width, device, masked=source.masked) for _ in range(feed.ahead + 1))
        self._ready: deque[_Slot] = deque()
        self._current: _Slot | None = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> DeviceBatch:
        if not 0 <= index < self._count:
            raise IndexError(f"batch {index} of {self._count}")
        size = self.size(index)
        with _disable_current_modes():  # for inspection, not part of a step
            host = host_batch(self.source, index)
            mask = None if host.mask is None else host.mask.to(self.device)
            return DeviceBatch(host.ids.to(self.device), host.labels.to(self.device), mask, size.tokens, size.padded)

    def __iter__(self) -> Iterator[DeviceBatch]:
        return (self[index] for index in range(self._count))

    def size(self, index: int) -> BlockSize:
        """Width and tokens of this batch."""
        return self.source.sizes[index]

    def held_bytes(self) -> int:
        """Bytes of the device that batches take."""
        slots = [*self._free, *self._ready, *([] if self._current is None else [self._current])]
        return sum(slot.nbytes() for slot in slots)

    def clear(self) -> None:
        """End the workers and release the buffers."""
        if self._stream is not None:
            self._stream.synchronize()
        self._supply = self._current = None
        self._free.clear()
        self._ready.clear()
        self._count = 0

    def go_to(self, index: int) -> None:
        """Restart at this batch: drop what ran ahead, and queue as many batches ahead as the feed asks for."""
        if self._current is not None:
            self._free.append(self._current)
            self._current = None
        self._free.extend(self._ready)
        self._ready.clear()
        if self._stream is not None:  # work already queued on these buffers comes first
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self.observed = FeedObservations()
        while self._next != index % self._count:
            self._fetch()
        for _ in range(self.feed.ahead):
            self._send()

    def take(self, index: int) -> DeviceBatch:
        """Return the batch of the step that now begins. The current stream waits for its copy."""
        place = index % self._count
        if self._by_index:
            return self._at_rest(place)
        if self._current is not None:  # an earlier step failed before it was done with
            self.taken()
        expected = self._ready[0].index if self._ready else self._next
        if expected != place or (self.feed.ahead and not self._ready):
            self.go_to(place)
        self.observed.ahead.add(len(self._ready))
        if not self.feed.ahead:
            self._send()
        slot = self._current = self._ready.popleft()
        if self._stream is not None and slot.filled is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.filled)
        return slot.batch

    def taken(self) -> None:
        """Free the batch's buffers behind the work that reads them, and queue the next batch."""
        slot, self._current = self._current, None
        if slot is None:
            return
        if self._stream is not None and slot.used is not None:
            slot.used.record(torch.cuda.current_stream(self.device))
        self._free.append(slot)
        if self.feed.ahead:
            self._send()

    @contextlib.contextmanager
    def by_index(self) -> Iterator[None]:
        """Within the block, make each step's batch in this process, by index, in the same buffers."""
        before, self._by_index = self._by_index, True
        try:
            yield
        finally:
            self._by_index = before

    @property
    def next_index(self) -> int:
        """Return the index of the batch that the loader gives next."""
        return self._next

    def discard(self, count: int) -> float:
        """Fetch and drop `count` batches; return the seconds that this takes."""
        began = time.perf_counter()
        for _ in range(count):
            self._fetch()
        return time.perf_counter() - began

    def _at_rest(self, place: int) -> DeviceBatch:
        if self._current is not None:  # an earlier step failed before it was done with
            self._free.append(self._current)
            self._current = None
        if self._ready:
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            self._free.extend(self._ready)
            self._ready.clear()
        with _disable_current_modes():
            host = host_batch(self.source, place)
        slot = self._free[0]
        slot.fill(host, self.size(place))
        slot.index = -1  # the next step in order must restart
        return slot.batch

    def _send(self) -> None:
        """Fetch the next batch and queue its copy into a free buffer."""
        host = self._fetch()
        slot = self._free.popleft()
        size = self.size(host.place)
        began = time.time_ns()
        if self._stream is None or slot.used is None or slot.filled is None:
            slot.fill(host, size)
        else:
            self._stream.wait_event(slot.used)  # returns at once for an event that was never recorded
            with torch.cuda.stream(self._stream):
                slot.fill(host, size)
                slot.filled.record(self._stream)
        self.observed.copied_ns.append((began, time.time_ns()))
        self._ready.append(slot)

    def _fetch(self) -> HostBatch:
        began = time.time_ns()
        # The loader's own tensor operations are not part of the step that is counted.
        with _disable_current_modes():
            if self._supply is None:
                self._supply = supply(self.source, self.feed, self._count, on_gpu=self.device.type == "cuda")
            host = next(self._supply)
        self.observed.fetched_ns.append((began, time.time_ns()))
        self.observed.makers.add(host.maker)
        self.observed.pinned.add(host.ids.is_pinned())
        assert host.place == self._next, f"the loader gave batch {host.place} in place of {self._next}"
        self._next = (host.place + 1) % self._count
        return host
