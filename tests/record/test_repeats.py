"""Records of several processes of one case merge into one record."""

from __future__ import annotations

import statistics
from pathlib import Path
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
from tests.strategies import a_case, a_record, around, busy, counted, failed_record, peak, positive, records, wall


def gpu_metrics(busy_s: float, kernels: int) -> dict[str, Metric]:
    return {"busy_s": busy(busy_s, samples=None), "kernels": counted(kernels, unit="1 per 10 steps")}


def steps(*samples: float) -> Metric:
    return wall(statistics.median(samples), samples=samples, gated=False)


def full(busy_s: float = 0.1, kernels: int = 5290, **changes: Any) -> Record:
    """The record of the first process, which runs every instrument."""
    return a_record(gpu_metrics(busy_s, kernels) | {"peak_bytes": peak(), "step_s": steps(0.2, 0.3, 0.4)}, **changes)


def further(busy_s: float = 0.1, kernels: int = 5290, **changes: Any) -> Record:
    """The record of a further process, without peak and wall time of a step."""
    return a_record(gpu_metrics(busy_s, kernels), **changes)


@given(records())
def test_merging_nothing_changes_nothing(record: Record) -> None:
    """A record merged with no others stays as it is, whatever its status."""
    assert merged(record, ()) == record


@given(positive, st.lists(positive, min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_the_value_is_the_median_of_all_processes(first: float, others: list[float], random: Any) -> None:
    """Each process gives one sample, in order; the value is their median, in any order."""
    record = merged(full(first), [further(value) for value in others])
    assert record.status == "ok"
    assert record.metrics["busy_s"].samples == (first, *others)
    assert record.metrics["busy_s"].value == statistics.median([first, *others])
    shuffled = list(others)
    random.shuffle(shuffled)
    reordered = merged(full(first), [further(value) for value in shuffled])
    assert reordered.metrics["busy_s"].value == record.metrics["busy_s"].value


@given(positive, st.lists(positive, min_size=1, max_size=6), st.data())
def test_merging_in_two_parts_is_merging_at_once(first: float, others: list[float], data: st.DataObject) -> None:
    """A merged record can take more processes later: the result is the same, and equals its JSON."""
    cut = data.draw(st.integers(0, len(others)))
    more = [further(value) for value in others]
    record = merged(full(first), more)
    assert merged(merged(full(first), more[:cut]), more[cut:]) == record
    assert record_from_json(record_to_json(record)) == record


@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_a_failed_process_costs_only_its_sample(succeeded: list[bool]) -> None:
    """The case stays ok; each failure is a note with its reason."""
    record = merged(full(), [further(0.2) if ok else failed_record() for ok in succeeded])
    assert record.status == "ok"
    assert len(busy_values(record)["busy_s"]) == 1 + sum(succeeded)
    assert [not process.failure for process in record.processes] == [True, *succeeded]
    notes = [note for note in record.circumstances.notes if "gave no sample: out_of_memory in build" in note]
    assert len(notes) == succeeded.count(False)


def test_the_clock_has_one_sample_per_process() -> None:
    """The clock merges as busy time does, so that each session keeps the clocks of all its processes; it is no time itself."""

    def at(mhz: float) -> Record:
        clock = Metric(value=mhz, unit="MHz", noise="busy", better="same", depends_on=("case",), gated=False)
        return a_record(gpu_metrics(0.1, 5290) | {"sm_clock_mhz": clock})

    record = merged(at(1980), [at(1650), at(1700)])
    assert (record.metrics["sm_clock_mhz"].samples, record.metrics["sm_clock_mhz"].value) == ((1980, 1650, 1700), 1700)
    assert set(busy_values(record)) == {"busy_s"}


def test_counts_that_differ_make_the_record_invalid() -> None:
    """The reason names the metric, both values with their unit, and both processes."""
    record = merged(full(), [further(), further(kernels=5291)])
    assert record.status == "invalid"
    assert len(record.reasons) == 1
    assert record.reasons[0].startswith(
        "kernels is 5,290 in process 1 and 5,291 in process 3 of the same case (per 10 steps): "
    )


def test_all_other_metrics_are_the_first_processs() -> None:
    """Peaks and wall samples come from the first process; each process's wall time is listed."""
    other = a_record(
        {"busy_s": busy(0.2, samples=None), "peak_bytes": peak(1, gated=False), "step_s": steps(0.5, 0.6, 0.7)}
    )
    record = merged(full(), [other])
    assert record.metrics["peak_bytes"] == full().metrics["peak_bytes"]
    assert record.wall_samples == (0.2, 0.3, 0.4)
    assert [process.wall_s for process in record.processes] == [{"step_s": 0.3}, {"step_s": 0.6}]


def test_a_throttled_process_is_flagged() -> None:
    """A throttled process's sample stays; the record flags it and numbers its notes."""
    gpu = {"busy": {"during": {"throttle_reasons": 4, "sm_clock_mhz": 1290}}}
    hot = further(0.11, circumstances=around(gpu=gpu, notes=("GPU throttled: power cap at 1290 MHz",)))
    record = merged(full(), [further(), hot])
    assert [process.flags for process in record.processes] == [(), (), ("throttled: power cap at 1290 MHz",)]
    assert "process 3 of tiny/lora: GPU throttled: power cap at 1290 MHz" in record.circumstances.notes
    assert len(busy_values(record)["busy_s"]) == 3


@pytest.mark.parametrize("status", ["failed", "invalid"])
def test_a_bad_first_process_stays_bad(status: str) -> None:
    """Further processes do not change a failed or invalid first record."""
    first = failed_record() if status == "failed" else full(status="invalid", reasons=("It ran unquantized.",))
    assert merged(first, [further()]) == first


def test_processes_of_another_case_are_refused() -> None:
    """A record of another case cannot be merged."""
    other = further(case=a_case("tiny/other", seed=7))
    with pytest.raises(SpecError, match="tiny/other cannot be merged into tiny/lora"):
        merged(full(), [other])


def test_an_accepted_record_keeps_its_samples(tmp_path: Path) -> None:
    """Baseline and history hold the samples of all processes."""
    record = merged(full(), [further(0.2), further(0.3)])
    accept(tmp_path, record, reason="first")
    key = record.circumstances.machine.key
    stored: Any = find(tmp_path, key, record.case.id)
    assert stored.metrics["busy_s"].samples == (0.1, 0.2, 0.3)
    assert last_accepted(tmp_path, key, record.case.id) == record
    assert msgspec.json.decode(record_to_json(record))["processes"][2]["seconds"] == 0.0
