"""The model of torch's caching allocator: laws that hold for any requests, and examples of torch's own rules."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.predict.allocator import Allocator
from tests import strategies  # noqa: F401 - registers the settings that make examples reproducible

KIB, MIB = 1 << 10, 1 << 20

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(MIB - KIB, MIB + KIB),
    st.integers(1, 30 * MIB),
    st.sampled_from([512, 513, MIB, MIB + 1, 2 * MIB, 10 * MIB - 512, 10 * MIB, 10 * MIB + 1, 20 * MIB]),
)
Steps = list[tuple[bool, int, int]]
"""Whether to give a block back rather than take one, how much to take, and which to give."""
STEPS = st.lists(st.tuples(st.booleans(), SIZES, st.integers(0, 10**6)), max_size=60)


def _played(steps: Steps) -> tuple[Allocator, dict[int, int]]:
    """The allocator after these steps, and what was asked for at each address that is still taken."""
    allocator, live = Allocator(), dict[int, int]()
    for give, size, which in steps:
        if give and live:
            address = sorted(live)[which % len(live)]
            allocator.free(address)
            del live[address]
        elif not give:
            taken = allocator.malloc(size)
            assert taken is not None
            live[taken] = size
    return allocator, live


def _segments(allocator: Allocator) -> list[list[tuple[int, int, bool]]]:
    """(address, size, free) of each segment's blocks, in the order of their links."""
    blocks = allocator._blocks
    found = []
    for start in [address for address, block in blocks.items() if block.before is None]:
        chain: list[tuple[int, int, bool]] = []
        at: int | None = start
        while at is not None:
            assert blocks[at].before == (chain[-1][0] if chain else None)
            chain.append((at, blocks[at].size, blocks[at].free))
            at = blocks[at].after
        found.append(chain)
    return found


@given(STEPS)
def test_what_is_allocated_is_what_is_alive(steps: Steps) -> None:
    """At every moment the counter is the sum of the living blocks, and no more than is reserved."""
    for length in range(len(steps) + 1):
        allocator, live = _played(steps[:length])
        assert allocator.allocated == sum(map(allocator.size_of, live))
        assert allocator.allocated <= allocator.peak_allocated <= allocator.peak_reserved == allocator.reserved


@given(STEPS)
def test_reserved_memory_never_shrinks(steps: Steps) -> None:
    """Segments are kept: nothing here gives one back to the driver."""
    reserved = [_played(steps[:length])[0].reserved for length in range(len(steps) + 1)]
    assert reserved == sorted(reserved)


@given(STEPS)
def test_a_block_is_at_least_what_was_asked_for_and_little_more(steps: Steps) -> None:
    """A whole number of units, and what is left is split off unless it is a large block's last MiB."""
    allocator, live = _played(steps)
    for address, requested in live.items():
        size = allocator.size_of(address)
        assert size % 512 == 0
        assert requested <= size < requested + 512 + (MIB if requested > MIB else 0)


@given(STEPS)
def test_blocks_tile_their_segments(steps: Steps) -> None:
    """Each begins where the one before ends, so none overlap; all together are what is reserved; two free ones never touch."""
    allocator, live = _played(steps)
    total, taken = 0, set[int]()
    for chain in _segments(allocator):
        for (address, size, free), (behind, _, free_too) in pairwise(chain):
            assert address + size == behind
            assert not (free and free_too)
        total += sum(size for _, size, _ in chain)
        taken |= {address for address, _, free in chain if not free}
    assert total == allocator.reserved
    assert taken == set(live)


@given(STEPS)
def test_the_lists_of_free_blocks_hold_the_free_blocks(steps: Steps) -> None:
    """Each free block stands once, with its size, in the list of its pool, and the lists are sorted."""
    allocator, _ = _played(steps)
    free = [(block.small, block.size, address) for address, block in allocator._blocks.items() if block.free]
    pools = {pool: sorted((size, at) for small, size, at in free if small is pool) for pool in (True, False)}
    assert allocator._free == pools


@given(STEPS)
def test_freeing_everything_leaves_whole_segments(steps: Steps) -> None:
    """Nothing is allocated any more, each segment is one free block, and every segment serves a request of its size."""
    allocator, live = _played(steps)
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
    """Two allocators that are asked the same end in the same state."""
    assert _played(steps) == _played(steps)


@given(STEPS, SIZES)
def test_what_is_given_back_serves_the_same_request(steps: Steps, size: int) -> None:
    """Freeing a block and asking again for as much reserves nothing more."""
    allocator, _ = _played(steps)
    allocator.free(allocator.malloc(size))
    reserved, allocated = allocator.reserved, allocator.allocated
    again = allocator.malloc(size)
    assert (allocator.reserved, allocator.allocated) == (reserved, allocated + allocator.size_of(again))


def test_a_mebibyte_comes_from_the_small_pool() -> None:
    """1 MiB is still small: half of a segment of 2 MiB, and a second one is its other half."""
    allocator = Allocator()
    first, second = allocator.malloc(MIB), allocator.malloc(MIB)
    assert first is not None
    assert second == first + MIB
    assert (allocator.allocated, allocator.reserved) == (2 * MIB, 2 * MIB)


def test_a_byte_more_comes_from_a_segment_of_20_mib() -> None:
    """It is large, counts as a whole number of units, and leaves the rest of its segment to others."""
    allocator = Allocator()
    allocator.malloc(MIB + 1)
    assert (allocator.allocated, allocator.reserved) == (MIB + 512, 20 * MIB)
    allocator.malloc(5 * MIB)
    assert allocator.reserved == 20 * MIB


@pytest.mark.parametrize(
    ("asked", "segment"),
    [(10 * MIB - 512, 20 * MIB), (10 * MIB, 10 * MIB), (10 * MIB + 1, 12 * MIB), (21 * MIB, 22 * MIB)],
)
def test_ten_mebibytes_get_a_segment_of_their_own(asked: int, segment: int) -> None:
    """From 10 MiB on a segment is as large as the request, rounded up to 2 MiB; just below it is one of 20 MiB."""
    allocator = Allocator()
    allocator.malloc(asked)
    assert allocator.reserved == segment


def test_the_last_mebibyte_of_a_large_block_is_not_split_off() -> None:
    """A request that leaves 1 MiB or less takes the whole block, and it counts as allocated; one unit more is split off."""
    whole, parted = Allocator(), Allocator()
    assert whole.size_of(whole.malloc(11 * MIB)) == whole.allocated == whole.reserved == 12 * MIB
    assert parted.size_of(parted.malloc(11 * MIB - 512)) == parted.allocated == 11 * MIB - 512
    assert parted.reserved == 12 * MIB


def test_the_best_fit_is_taken() -> None:
    """Of several free blocks that are large enough, the smallest serves, wherever it lies."""
    allocator = Allocator()
    large, small = allocator.malloc(40 * MIB), allocator.malloc(30 * MIB)
    allocator.free(large)
    allocator.free(small)
    assert allocator.malloc(29 * MIB + 512) == small


def test_small_and_large_requests_do_not_share() -> None:
    """A small request does not take from a large segment, however much of it is free."""
    allocator = Allocator()
    allocator.free(allocator.malloc(20 * MIB))
    allocator.malloc(512)
    assert allocator.reserved == 22 * MIB


def test_peaks_start_again_from_what_is_there() -> None:
    """After a reset the highest is what is alive; what was freed before it is forgotten."""
    allocator = Allocator()
    kept = allocator.malloc(3 * MIB)
    allocator.free(allocator.malloc(30 * MIB))
    assert (allocator.peak_allocated, allocator.peak_reserved) == (33 * MIB, 50 * MIB)
    allocator.reset_peaks()
    assert allocator.peak_allocated == allocator.size_of(kept) == 3 * MIB
    assert allocator.peak_reserved == 50 * MIB


def test_nothing_takes_nothing() -> None:
    """An empty request has no address, and giving it back does nothing."""
    allocator = Allocator()
    assert allocator.malloc(0) is None
    allocator.free(None)
    assert allocator.size_of(None) == allocator.allocated == allocator.reserved == 0


def test_mistakes_are_said() -> None:
    """A block given back twice, an address that never was, and a negative request are errors that change nothing."""
    allocator = Allocator()
    kept, address = allocator.malloc(100), allocator.malloc(512)
    allocator.free(address)
    for wrong in (address, 7):
        with pytest.raises(ValueError, match="Nothing is allocated at 0x"):
            allocator.free(wrong)
    with pytest.raises(ValueError, match="-1 bytes"):
        allocator.malloc(-1)
    assert allocator.allocated == allocator.size_of(kept)
