"""Predictions of memory alone, and what fills memory at the end of a long answer."""

from __future__ import annotations

import functools

import pytest

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import TINY, generate, tiny
from hpc_core.record.job import Job, Predict
from hpc_core.record.record import Record
from tests.predict.predicting import GPU, predicted_jobs, values

pytestmark = pytest.mark.nightly

_BY_ID = {case.id: case for case in TINY}
OWN = Case(id="own/train", scale="tiny", workload=CallableSpec(factory="tests.predict.own_steps:train"))
LONG = generate(tiny, variant="generate-long", batch=8, prompts=1, prompt_length=16, new_tokens=600)
CASES = (_BY_ID["tiny/lora"], _BY_ID["tiny/generate-bf16"], OWN, LONG)
_COUNTS = {"flops", "operators", "kernels", "copies", "bytecodes", "flops_prefill", "operators_decode"}


@functools.cache
def _records() -> dict[tuple[str, bool], Record]:
    jobs = [Job(case=case, kind=Predict(gpu=GPU, memory_only=only)) for case in CASES for only in (False, True)]
    return {(job.case.id, job.kind.memory_only): record for job, record in zip(jobs, predicted_jobs(jobs), strict=True)}  # type: ignore[union-attr]


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: str(case.id))
def test_memory_alone_is_the_same_memory_without_counts(case: Case) -> None:
    """`memory_only` leaves out the steps that count operators and kernels, and no peak changes."""
    whole, alone = (values(_records()[case.id, only]) for only in (False, True))
    assert whole.keys() >= {"flops", "operators", "kernels", "bytecodes"}
    assert not alone.keys() & _COUNTS
    peaks = {name for name in whole if name.startswith("peak_")} - {"peak_requested_bytes"}
    assert {name: alone[name] for name in peaks} == {name: whole[name] for name in peaks}


def test_a_long_answers_cache_is_not_rounding() -> None:
    """At the end of a long answer the keys and values of all its tokens are at the peak, by name."""
    record = _records()[LONG.id, True]
    assert record.case.model is not None
    shape = record.case.model.sizes
    assert shape is not None
    entry = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    found = values(record)
    assert found["at_peak_kv_cache_bytes"] >= 8 * (16 + 600 - 2) * entry
    assert found["at_peak_rounding_bytes"] < 2**20
