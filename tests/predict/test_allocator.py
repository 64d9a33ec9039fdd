"""The model of torch's caching allocator: laws that hold for any requests, and examples of torch's own rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.predict.allocator import Allocator

KIB, MIB = 1 << 10, 1 << 20

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(MIB - KIB, MIB + KIB),
    st.integers(1, 30 * MIB),
    st.sampled_from([512, 513, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB, 10 * MIB + 1, 20 * MIB]),
)
Steps = list[tuple[bool, int, int]]
"""Whether to free a block rather than allocate one, the size to allocate, and which block to free."""
STEPS = st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 10**6)), max_size=60)


def _replay(steps: Steps) -> tuple[Allocator, dict[int, int]]:
    """The allocator after these steps, and the requested size by address of each live block."""
    allocator, live = Allocator(), dict[int, int]()
    for free, size, which in steps:
        if free and live:
            address = sorted(live)[which % len(live)]
            allocator.free(address)
            del live[address]
        elif not free:
            allocated = allocator.malloc(size)
            assert allocated is not None
            live[allocated] = size
    return allocator, live


def _segments(allocator: Allocator) -> list[list[tuple[int, int, bool]]]:
    """The blocks of each segment as (address, size, free), in the order of their links."""
    blocks = allocator._blocks
    segments = []
    for start in [address for address, block in blocks.items() if block.before is None]:
        chain: list[tuple[int, int, bool]] = []
        at: int | None = start
        while at is not None:
            assert blocks[at].before == (chain[-1][0] if chain else None)
            chain.append((at, blocks[at].size, blocks[at].free))
            at = blocks[at].after
        segments.append(chain)
    return segments


@given(STEPS)
def test_counters_follow_the_live_blocks(steps: Steps) -> None:
    """Allocated bytes are the sum of the live blocks and fit in the reserved bytes, which never shrink."""
    reserved = 0
    for length in range(len(steps) + 1):
        allocator, live = _replay(steps[:length])
        assert allocator.allocated == sum(map(allocator.size_of, live))
        assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved == allocator.reserved
        assert allocator.reserved >= reserved
        reserved = allocator.reserved


@given(STEPS)
def test_a_block_is_little_larger_than_its_request(steps: Steps) -> None:
    """A block is a whole number of units. The rest is split off, unless it is the last MiB of a large block."""
    allocator, live = _replay(steps)
    for address, requested in live.items():
        size = allocator.size_of(address)
        assert size % 512 == 0
        assert requested <= size < requested + 512 + (MIB if requested > MIB else 0)


@given(STEPS)
def test_blocks_tile_their_segments(steps: Steps) -> None:
    """Blocks tile their segments without gaps or overlaps, and two free blocks never touch."""
    allocator, live = _replay(steps)
    total, used = 0, set[int]()
    for chain in _segments(allocator):
        for (address, size, free), (next_address, _, next_free) in pairwise(chain):
            assert address + size == next_address
            assert not (free and next_free)
        total += sum(size for _, size, _ in chain)
        used |= {address for address, _, free in chain if not free}
    assert total == allocator.reserved
    assert used == set(live)


@given(STEPS)
def test_free_lists_hold_exactly_the_free_blocks(steps: Steps) -> None:
    """The free list of each pool holds each of its free blocks once, sorted by size."""
    allocator, _ = _replay(steps)
    free = [(block.small, block.size, address) for address, block in allocator._blocks.items() if block.free]
    pools = {pool: sorted((size, at) for small, size, at in free if small is pool) for pool in (True, False)}
    assert allocator._free == pools


@given(STEPS)
def test_freeing_everything_leaves_whole_segments(steps: Steps) -> None:
    """After everything is freed, each segment is one free block that serves a request of its size."""
    allocator, live = _replay(steps)
    for address in live:
        allocator.free(address)
    assert allocator.allocated == 0
    assert all([free for _, _, free in chain] == [True] for chain in _segments(allocator))
    reserved = allocator.reserved
    for size, _ in sorted(allocator._free[False], reverse=True):
        allocator.malloc(size)
    for _ in range(2 * len(allocator._free[True])):
        allocator.malloc(MIB)
    assert allocator.allocated == allocator.reserved == reserved


@given(STEPS)
def test_the_same_requests_give_the_same_addresses(steps: Steps) -> None:
    """The same requests give the same addresses and counters."""
    assert _replay(steps) == _replay(steps)


@given(STEPS, SIZES)
def test_a_freed_block_serves_the_same_request(steps: Steps, size: int) -> None:
    """Freeing a block and requesting the same size reserves nothing more."""
    allocator, _ = _replay(steps)
    allocator.free(allocator.malloc(size))
    reserved, allocated = allocator.reserved, allocator.allocated
    again = allocator.malloc(size)
    assert (allocator.reserved, allocator.allocated) == (reserved, allocated + allocator.size_of(again))


def test_a_mebibyte_comes_from_the_small_pool() -> None:
    """A request of 1 MiB is small: two of them share one segment of 2 MiB."""
    allocator = Allocator()
    first, second = allocator.malloc(MIB), allocator.malloc(MIB)
    assert first is not None
    assert second == first + MIB
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)


def test_a_byte_more_than_a_mebibyte_comes_from_a_segment_of_20_mib() -> None:
    """A request of 1 MiB and a byte is large, takes whole units, and leaves the rest of its segment to others."""
    allocator = Allocator()
    allocator.malloc(MIB + 1)
    assert (allocator.allocated, allocator.reserved) == (MIB + 512, 20 * MIB)
    allocator.malloc(5 * MIB)
    assert allocator.reserved == 20 * MIB


@pytest.mark.parametrize(
    ("size", "segment"),
    [(10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (21 * MIB, 22 * MIB)],
)
def test_ten_mebibytes_get_a_segment_of_their_own(size: int, segment: int) -> None:
    """From 10 MiB on, a request gets a segment of its own size rounded up to 2 MiB; below, one of 20 MiB."""
    allocator = Allocator()
    allocator.malloc(size)
    assert allocator.reserved == segment


def test_the_last_mebibyte_of_a_large_block_is_not_split_off() -> None:
    """A rest of 1 MiB or less stays with a large block and counts as allocated; one unit more is split off."""
    whole, split = Allocator(), Allocator()
    assert whole.size_of(whole.malloc(11 * MIB)) == whole.allocated == whole.reserved == 12 * MIB
    assert split.size_of(split.malloc(11 * MIB - 512)) == split.allocated == 11 * MIB - 512
    assert split.reserved == 12 * MIB


def test_the_best_fit_is_taken() -> None:
    """The smallest free block that is large enough serves a request."""
    allocator = Allocator()
    large, small = allocator.malloc(40 * MIB), allocator.malloc(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(29 * MIB + 512) == small


def test_small_and_large_requests_do_not_share() -> None:
    """A small request takes nothing from a large segment, however much of it is free."""
    allocator = Allocator()
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(512)
    assert allocator.reserved == 22 * MIB


def test_peaks_restart_from_the_live_blocks() -> None:
    """After a reset, the peak of allocated bytes is that of the live blocks."""
    allocator = Allocator()
    live = allocator.malloc(3 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    assert (allocator.peak_allocated, allocator.peak_reserved) == (33 * MIB, 50 * MIB)
    allocator.reset_peaks()
    assert allocator.peak_allocated == allocator.size_of(live) == 3 * MIB
    assert allocator.peak_reserved == 50 * MIB


def test_an_empty_request_takes_nothing() -> None:
    """An empty request has no address, and freeing it does nothing."""
    allocator = Allocator()
    assert allocator.malloc(0) is None
    allocator.free(None)
    assert allocator.size_of(None) == allocator.allocated == allocator.reserved == 0


def test_wrong_requests_raise_and_change_nothing() -> None:
    """Freeing twice, freeing an unknown address and a negative request raise ValueError and change nothing."""
    allocator = Allocator()
    live, address = allocator.malloc(100), allocator.malloc(512)
    allocator.free(address)
    for wrong in (address, 7):
        with pytest.raises(ValueError, match="Nothing is allocated at 0x"):
            allocator.free(wrong)
    with pytest.raises(ValueError, match="-1 bytes"):
        allocator.malloc(-1)
    assert allocator.allocated == allocator.size_of(live)
