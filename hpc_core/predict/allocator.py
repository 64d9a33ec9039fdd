"""A model of torch's CUDA caching allocator: allocated and reserved bytes for a sequence of requests.

It imports no torch. It models the native backend with its default configuration and one stream, as in
`c10/cuda/CUDACachingAllocator.cpp` of torch 2.11 to 2.13. Requests are rounded up to 512 bytes and served best fit from free blocks.
The rest of a block is split off, and merged again when its neighbour is freed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass, field

_ROUND = 512
"""`kMinBlockSize`."""
_SMALL = 1 << 20
"""`kSmallSize`: the largest request that the small pool serves."""
_SMALL_SEGMENT = 2 << 20
"""`kSmallBuffer`: the segment size of the small pool."""
_LARGE_SEGMENT = 20 << 20
"""`kLargeBuffer`: the segment size for requests from 1 to 10 MiB."""
_MIN_LARGE = 10 << 20
"""`kMinLargeAlloc`: the smallest request that gets its own segment."""
_ROUND_LARGE = 2 << 20
"""`kRoundLarge`: such a segment is rounded up to a multiple of this."""
_ADDRESS_GAP = 1 << 30
"""Space between two segments, so that their blocks are never neighbours."""


@dataclass(slots=True)
class _Block:
    size: int
    small: bool
    free: bool = True
    before: int | None = None
    after: int | None = None


@dataclass
class Allocator:
    """Blocks by address. `allocated` and `reserved` are bytes as `torch.cuda.memory_stats` counts them."""

    allocated: int = 0
    reserved: int = 0
    peak_allocated: int = 0
    peak_reserved: int = 0
    _blocks: dict[int, _Block] = field(default_factory=dict)
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    """Free blocks of the small and the large pool as (size, address), sorted: best fit, lowest address first."""
    _next_address: int = _ADDRESS_GAP

    def malloc(self, requested: int) -> int | None:
        """Allocate `requested` bytes and return their address, or None for an empty request.

        Raises:
            ValueError: a negative request.
        """
        if requested < 0:
            raise ValueError(f"Cannot allocate {requested} bytes.")
        if requested == 0:
            return None
        size = -(-requested // _ROUND) * _ROUND
        small = size <= _SMALL
        address = self._find(size, small)
        block = self._blocks[address]
        block.free = False
        self._split(address, block, size)
        self.allocated += block.size
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return address

    def _find(self, size: int, small: bool) -> int:
        pool = self._free[small]
        index = bisect_left(pool, (size, 0))
        if index < len(pool):
            return pool.pop(index)[1]
        segment = _SMALL_SEGMENT if small else _LARGE_SEGMENT
        if size >= _MIN_LARGE:
            segment = -(-size // _ROUND_LARGE) * _ROUND_LARGE
        address = self._next_address
        self._next_address += segment + _ADDRESS_GAP
        self._blocks[address] = _Block(segment, small)
        self.reserved += segment
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return address

    def _split(self, address: int, block: _Block, size: int) -> None:
        """Split off the rest as `should_split` says: any whole unit in the small pool, more than 1 MiB in the large one."""
        rest = block.size - size
        if rest < _ROUND or (not block.small and rest <= _SMALL):
            return
        behind = address + size
        self._blocks[behind] = _Block(rest, block.small, before=address, after=block.after)
        if block.after is not None:
            self._blocks[block.after].before = behind
        block.after, block.size = behind, size
        insort(self._free[block.small], (rest, behind))

    def free(self, address: int | None) -> None:
        """Free a block and merge it with free neighbours in its segment.

        Raises:
            ValueError: nothing was allocated at this address.
        """
        if address is None:
            return
        block = self._blocks.get(address)
        if block is None or block.free:
            raise ValueError(f"Nothing is allocated at {address:#x}.")
        self.allocated -= block.size
        block.free = True
        if block.after is not None and self._blocks[block.after].free:
            self._swallow(block, address, block.after)
        if block.before is not None and self._blocks[block.before].free:
            before = block.before
            first = self._blocks[before]
            self._remove(first, before)
            self._join(first, before, block, address)
            address, block = before, first
        insort(self._free[block.small], (block.size, address))

    def _swallow(self, block: _Block, address: int, after: int) -> None:
        behind = self._blocks[after]
        self._remove(behind, after)
        self._join(block, address, behind, after)

    def _join(self, first: _Block, address: int, second: _Block, at: int) -> None:
        first.size += second.size
        first.after = second.after
        if second.after is not None:
            self._blocks[second.after].before = address
        del self._blocks[at]

    def _remove(self, block: _Block, address: int) -> None:
        pool = self._free[block.small]
        pool.pop(bisect_left(pool, (block.size, address)))

    def empty_cache(self) -> None:
        """Return the segments that hold nothing, as `torch.cuda.empty_cache` does."""
        for address, block in list(self._blocks.items()):
            if block.free and block.before is None and block.after is None:
                self._remove(block, address)
                del self._blocks[address]
                self.reserved -= block.size

    def size_of(self, address: int | None) -> int:
        """Return the allocated bytes of the block at this address, or 0 for None."""
        return 0 if address is None else self._blocks[address].size

    def reset_peaks(self) -> None:
        """Do what `torch.cuda.reset_peak_memory_stats` does."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved
