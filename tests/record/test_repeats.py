"""Laws of several processes of one case as one record."""

from __future__ import annotations

import statistics
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.baselines.accept import accept
from hpc_core.baselines.history import last_accepted
from hpc_core.baselines.lookup import find
from hpc_core.case.errors import SpecError
from hpc_core.record.record import Metric, Record, record_from_json, record_to_json
from hpc_core.record.repeats import busy_values, merged
from tests.strategies import a_case, a_record, around, counted, failed_record, peak, positive, records

PER = "1 per 10 steps"


def seconds(value: float) -> Metric:
    return Metric(value=value, unit="s", noise="busy", better="lower", depends_on=("case", "stack", "machine"))


def clocked(*samples: float) -> Metric:
    value = statistics.median(samples)
    return Metric(
        value=value,
        samples=samples,
        unit="s",
        noise="wall",
        better="lower",
        depends_on=("case", "stack", "machine"),
        gated=False,
    )


def full(busy_s: float = 0.1, kernels: int = 5290, **changes: Any) -> Record:
    """What a full process gives."""
    metrics = {
        "busy_s": seconds(busy_s),
        "kernels": counted(kernels, unit=PER),
        "peak_bytes": peak(),
        "step_s": clocked(0.2, 0.3, 0.4),
    }
    return a_record(metrics, **changes)


def further(busy_s: float = 0.1, kernels: int = 5290, **changes: Any) -> Record:
    """What a further process gives: no peak of a step, and no step by the clock."""
    return a_record({"busy_s": seconds(busy_s), "kernels": counted(kernels, unit=PER)}, **changes)


@given(records())
def test_merging_nothing_changes_nothing(record: Record) -> None:
    """A case with one process is that process's record, whatever became of it."""
    assert merged(record, ()) == record


@given(positive, st.lists(positive, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_value_is_the_median_in_whatever_order(own: float, others: list[float], random: Any) -> None:
    """One sample a process, the first process's first; their order moves no value."""
    record = merged(full(own), [further(value) for value in others])
    shuffled = list(others)
    random.shuffle(shuffled)
    assert record.status == "ok"
    assert record.metrics["busy_s"].samples == (own, *others)
    assert record.metrics["busy_s"].value == statistics.median([own, *others])
    assert (
        merged(full(own), [further(value) for value in shuffled]).metrics["busy_s"].value
        == record.metrics["busy_s"].value
    )


@given(positive, st.lists(positive, min_size=1, max_size=6), st.data())
def test_adding_processes_later_is_the_same(own: float, others: list[float], data: st.DataObject) -> None:
    """A record that was merged can be continued: in two parts or in one, the record is equal, and equal to its JSON."""
    cut = data.draw(st.integers(0, len(others)))
    more = [further(value) for value in others]
    record = merged(full(own), more)
    assert merged(merged(full(own), more[:cut]), more[cut:]) == record
    assert record_from_json(record_to_json(record)) == record


@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_a_failed_process_costs_its_sample_and_not_the_case(sound: list[bool]) -> None:
    """Each failure is a note with its reason; the processes without one stand in the order of the samples."""
    record = merged(full(), [further(0.2) if ok else failed_record() for ok in sound])
    assert record.status == "ok"
    assert len(busy_values(record)["busy_s"]) == 1 + sum(sound)
    assert [not process.failure for process in record.processes] == [True, *sound]
    notes = [note for note in record.circumstances.notes if "gave no sample: out_of_memory in build" in note]
    assert len(notes) == sound.count(False)


def test_counts_that_differ_make_the_record_invalid() -> None:
    """The reason holds the metric, both numbers, their unit and which process it was."""
    record = merged(full(), [further(), further(kernels=5291)])
    assert record.status == "invalid"
    assert len(record.reasons) == 1
    assert record.reasons[0].startswith(
        "kernels is 5,290 in process 1 and 5,291 in process 3 of the same case (per 10 steps): "
    )


def test_all_else_is_the_first_process() -> None:
    """Peaks and wall samples are the first's; what a clock saw in the others stands beside it."""
    other = a_record(
        {"busy_s": seconds(0.2), "peak_bytes": peak(gated=False, value=1), "step_s": clocked(0.5, 0.6, 0.7)}
    )
    record = merged(full(), [other])
    assert record.metrics["peak_bytes"] == full().metrics["peak_bytes"]
    assert record.wall_samples == (0.2, 0.3, 0.4)
    assert [process.wall_s for process in record.processes] == [{"step_s": 0.3}, {"step_s": 0.6}]


def test_a_throttled_process_is_flagged() -> None:
    """The sample of a doubtful process stays, its flags say why to doubt it, and its notes carry its number."""
    gpu = {"busy": {"during": {"throttle_reasons": 4, "sm_clock_mhz": 1290}}}
    hot = further(0.11, circumstances=around(gpu=gpu, notes=("GPU throttled: power cap at 1290 MHz",)))
    record = merged(full(), [further(), hot])
    assert [process.flags for process in record.processes] == [(), (), ("throttled: power cap at 1290 MHz",)]
    assert "process 3 of tiny/lora: GPU throttled: power cap at 1290 MHz" in record.circumstances.notes
    assert len(busy_values(record)["busy_s"]) == 3


@pytest.mark.parametrize("status", ["failed", "invalid"])
def test_a_case_that_gave_nothing_stays_as_it_is(status: str) -> None:
    """Further processes do not make a broken first one sound."""
    first = failed_record() if status == "failed" else full(status="invalid", reasons=("It ran unquantized.",))
    assert merged(first, [further()]) == first


def test_processes_of_another_case_are_refused() -> None:
    """A record of other work is no sample."""
    other = further(case=a_case("tiny/other", seed=7))
    with pytest.raises(SpecError, match="tiny/other cannot be merged into tiny/lora"):
        merged(full(), [other])


def test_an_accepted_record_keeps_its_samples(tmp_path: Any) -> None:
    """Baseline and history hold the samples of all processes, and read back as they were."""
    record = merged(full(), [further(0.2), further(0.3)])
    accept(tmp_path, record, reason="first")
    key = record.circumstances.machine.key
    stored: Any = find(tmp_path, key, record.case.id)
    assert stored.metrics["busy_s"].samples == (0.1, 0.2, 0.3)
    assert last_accepted(tmp_path, key, record.case.id) == record
    assert msgspec.json.decode(record_to_json(record))["processes"][2]["seconds"] == 0.0
