"""Every tiny case of the catalogue, measured once in this process for all tests that read its record."""

from __future__ import annotations

import functools

from hpc_core.case.case import Case
from hpc_core.catalogue import TINY
from hpc_core.record.job import Event, Job, Kind, Measure, Phase
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform

# The soak is short here; tests/worker/test_soak.py runs its two hundred steps.
TINY_CASES = {case.id: case.vary("lora-soak", steps=50) if case.id == "tiny/lora-soak" else case for case in TINY}


def measured(case: Case, kind: Kind | None = None) -> tuple[Record, list[str]]:
    """The record of a case, and the phases in which it was measured."""
    events: list[Event] = []
    record = perform(Job(case=case, launched="inline", kind=kind or Measure()), events.append)
    return record, [event.name for event in events if isinstance(event, Phase)]


@functools.cache
def measured_once(case_id: str) -> tuple[Record, list[str]]:
    """As `measured`, of a tiny case, once in this process."""
    return measured(TINY_CASES[case_id])


def tiny_record(case_id: str) -> Record:
    """The record of a tiny case, measured once in this process."""
    return measured_once(case_id)[0]
