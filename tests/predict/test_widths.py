"""Ragged batches: three widths are watched, and the counts of the others follow from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.catalogue import TINY
from hpc_core.predict.finetune import between, to_watch
from hpc_core.predict.watch import Counts
from hpc_core.record.job import Job
from hpc_core.worker.perform import perform
from tests.predict.predicting import predicted


@pytest.mark.nightly
def test_flops_between_three_watched_widths_are_exact() -> None:
    """The FLOPs of ten ragged widths, computed from three, equal those that a run counts."""
    case = next(case for case in TINY if case.id == "tiny/lora-padded").vary("lora-wide", steps=10, batch=3)
    [record] = predicted([case])
    measured = perform(Job(case=case, device="cpu"), lambda _: None)
    assert [note for note in record.circumstances.notes if note.startswith("counts: of ")]
    assert record.metrics["flops"].value == measured.metrics["flops"].value


@given(st.lists(st.integers(1, 5000), min_size=3, max_size=6, unique=True), st.tuples(*[st.integers(0, 10**12)] * 3))
def test_three_points_determine_a_parabola(widths: list[int], factors: tuple[int, int, int]) -> None:
    """Three widths of a parabola give all others, in whole FLOPs."""

    def at(width: int) -> Counts:
        return Counts(7, sum(factor * width**power for power, factor in enumerate(factors)), 5, 3)

    known = {width: at(width) for width in to_watch(sorted(widths))}
    assert [between(known, width) for width in widths] == [at(width) for width in widths]
