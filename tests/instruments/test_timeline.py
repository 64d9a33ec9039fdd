"""Laws of the timeline: categories add up to the peak, and peaks equal brute force."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.instruments.timeline import CATEGORIES, Allocation, Timeline

PHASES = ("forward", "backward", "optimizer")


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Allocations with distinct event numbers, some from before the step and some that outlive it."""
    count = draw(st.integers(1, 12))
    ends = sorted(draw(st.lists(st.integers(1, 40), min_size=3, max_size=3)))
    clock = draw(st.permutations(range(1, 2 * count + 1)))

    def phase_at(event: int) -> int:
        return next((index for index, end in enumerate(ends) if event <= end), 2)

    pieces = []
    for number in range(count):
        born, died = sorted(clock[2 * number : 2 * number + 2])
        before, stays = draw(st.booleans()), draw(st.booleans())
        pieces.append(
            Allocation(
                size_bytes=draw(st.integers(0, 1000)),
                born=0 if before else born,
                phase=-1 if before else phase_at(born),
                died=None if stays else died,
                died_in=None if stays else phase_at(died),
                category=draw(st.sampled_from([None, *CATEGORIES])),
            )
        )
    return Timeline(pieces)


def _live(timeline: Timeline, event: int) -> int:
    return sum(
        piece.size_bytes
        for piece in timeline.allocations
        if piece.born <= event and (piece.died is None or piece.died > event)
    )


@given(timelines())
def test_categories_at_the_peak_add_up_to_it(timeline: Timeline) -> None:
    """The categories at the peak add up to it."""
    totals = timeline.at_peak()
    assert sum(totals.values()) == timeline.peak()[1]
    assert set(totals) == set(CATEGORIES)


@given(timelines())
def test_the_peak_is_the_highest_of_all_events(timeline: Timeline) -> None:
    """The peak equals the largest sum of live allocations over all events, at the event that it names."""
    when, peak = timeline.peak()
    assert peak == max(_live(timeline, event) for event in range(30))
    assert _live(timeline, when) == peak


@given(timelines())
def test_each_phases_peak_is_the_highest_of_its_events(timeline: Timeline) -> None:
    """A phase's peak equals brute force over its events and the moment before its first one."""
    moments = [(p.born, p.phase) for p in timeline.allocations] + [
        (p.died or 0, p.died_in or 0) for p in timeline.allocations if p.died
    ]
    assert set(timeline.peaks_by_phase(PHASES)) == set(PHASES)
    for index, name in enumerate(PHASES):
        before = max((event for event, phase in moments if phase < index), default=0)
        own = [event for event, phase in moments if phase == index]
        assert timeline.peaks_by_phase(PHASES)[name] == max(_live(timeline, event) for event in [before, *own])


def test_an_empty_timeline_has_no_peak() -> None:
    """An empty timeline has zero bytes everywhere."""
    assert Timeline().peak() == (0, 0)
    assert Timeline().peaks_by_phase(PHASES) == dict.fromkeys(PHASES, 0)
    assert sum(Timeline().at_peak().values()) == 0


def test_unnamed_memory_is_classified_by_its_lifetime() -> None:
    """Unnamed memory is an activation if a later phase needs it, else a temporary; from before the step it is `other`."""
    timeline = Timeline(
        [
            Allocation(size_bytes=1, born=0, phase=-1),
            Allocation(size_bytes=10, born=1, phase=0, died=9, died_in=1),
            Allocation(size_bytes=100, born=2, phase=0, died=8, died_in=0),
            Allocation(size_bytes=1000, born=3, phase=0, category="weights"),
            Allocation(size_bytes=10_000, born=4, phase=0),
        ]
    )
    owners = {name: value for name, value in timeline.at_peak().items() if value}
    assert owners == {"other": 1, "activations": 10 + 10_000, "temporaries": 100, "weights": 1000}


@given(timelines(), st.integers(7, 30))
def test_samples_keep_the_peak_and_add_nothing(timeline: Timeline, most: int) -> None:
    """A sample has at most the requested points, each a real moment, with the peak and its categories among them."""
    sampled = timeline.sampled(PHASES, most)
    assert len(sampled.events) <= most
    assert list(sampled.events) == sorted(set(sampled.events))
    assert sampled.totals == tuple(_live(timeline, event) for event in sampled.events)
    when, peak = timeline.peak()
    assert max(sampled.totals) == peak
    if peak:
        at = sampled.events.index(when)
        assert {name: column[at] for name, column in sampled.bytes_by_category.items() if column[at]} == {
            name: size for name, size in timeline.at_peak().items() if size
        }


@given(st.lists(st.integers(1, 1000), min_size=500, max_size=1000))
@settings(max_examples=10)
def test_a_long_timeline_is_sampled(sizes: list[int]) -> None:
    """A long timeline becomes at most 400 points, with the first of each phase and the peak among them."""
    third = len(sizes) // 3 + 1
    pieces = [
        Allocation(size_bytes=size, born=2 * at + 1, phase=at // third, died=2 * at + 2, died_in=at // third)
        for at, size in enumerate(sizes)
    ]
    sampled = Timeline(pieces).sampled(PHASES)
    assert 390 <= len(sampled.events) <= 400
    assert max(sampled.totals) == max(sizes)
    assert {1, 2 * third + 1, 4 * third + 1} <= set(sampled.events)
    assert set(sampled.bytes_by_category) == {"temporaries"}
