"""Prediction runs on every kind of case, and its bytes equal the closed forms. All cases are tiny, and many share a process."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from hpc_core.bounds.check import impossible
from hpc_core.bounds.cost import train_floor
from hpc_core.bounds.footprint import expected_bytes
from hpc_core.case.case import Case
from hpc_core.case.parts import DataSpec, ModelSpec, QuantSpec
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.catalogue import TINY, generate, tiny
from hpc_core.record.record import Record, record_from_json, record_to_json
from tests.predict.predicting import predicted, values

pytestmark = pytest.mark.slow

_BY_VARIANT = {case.id.partition("/")[2]: case for case in TINY}
FULL, LORA, QLORA = (_BY_VARIANT[name] for name in ("full-bf16", "lora", "qlora"))
_TRACE = DataSpec(source="trace", name="wikitext2", rows=64)
_NF4 = QuantSpec(kind="nf4", compute_dtype="bfloat16")

MORE: tuple[Case, ...] = (
    FULL.vary("full-reentrant", checkpointing="reentrant"),
    FULL.vary("full-eager", attention="eager"),
    FULL.vary("full-autocast", precision="autocast-bf16", model_dtype="float32"),
    FULL.vary("full-foreach", optimizer="adamw-foreach"),
    FULL.vary("full-8bit", optimizer="adamw-8bit"),
    FULL.vary("full-paged", optimizer="adamw-paged-8bit"),
    LORA.vary("lora-reentrant", checkpointing="reentrant"),
    LORA.vary("lora-autocast", precision="autocast-bf16"),
    LORA.vary("lora-foreach", optimizer="adamw-foreach"),
    LORA.vary("lora-8bit-everywhere", optimizer="adamw-8bit", rank=32, targets=("q_proj", "up_proj", "down_proj")),
    LORA.vary("lora-padded-eager", attention="eager", data=_TRACE, padding="longest", steps=2),
    QLORA.vary("qlora-prepare-reentrant", prepare=True, checkpointing="reentrant"),
    QLORA.vary("qlora-prepare-non-reentrant", prepare=True, checkpointing="non-reentrant"),
    QLORA.vary("qlora-prepare-autocast", prepare=True, precision="autocast-bf16"),
    QLORA.vary("qlora-fp4", quantization=QuantSpec(kind="fp4", compute_dtype="bfloat16")),
    QLORA.vary("qlora-dq", double_quant=True),
    QLORA.vary("qlora-int8", quantization=QuantSpec(kind="int8", compute_dtype="float16")),
    QLORA.vary("qlora-padded", data=_TRACE, padding="longest", steps=2),
    generate(tiny, variant="generate-batch", batch=3, prompts=2, prompt_length=None, new_tokens=6, data=_TRACE),
    generate(tiny, variant="generate-no-cache", batch=2, prompts=1, prompt_length=16, new_tokens=4, cache="off"),
    generate(
        ModelSpec(shape="tiny", attention="eager"), variant="generate-eager", prompts=1, prompt_length=16, new_tokens=4
    ),
    generate(
        tiny, variant="generate-static", prompts=1, prompt_length=16, new_tokens=6, cache="static", compiled=False
    ),
    generate(tiny, variant="generate-two", prompts=1, prompt_length=16, new_tokens=2),
    generate(
        tiny,
        variant="generate-fp4",
        quantization=QuantSpec(kind="fp4", compute_dtype="float32"),
        prompts=1,
        prompt_length=16,
        new_tokens=4,
    ),
)
_KINDS = "generate-bf16 generate-nf4-dq generate-int8 full-bf16 full-fp32 lora lora-gc qlora qlora-prepare lora-padded lora-packed"
PLAIN = tuple(_BY_VARIANT[name] for name in _KINDS.split())
CASES = {case.id: case for case in (*PLAIN, *MORE)}
_MARKS = dict.fromkeys((case.id for case in MORE), pytest.mark.nightly)


def _each(*ids: str) -> list[Any]:
    """Parameters of a test: the plain cases by day, the others at night."""
    return [pytest.param(name, marks=_MARKS.get(name, ())) for name in ids]


@functools.cache
def _batch(cases: tuple[Case, ...]) -> dict[str, Record]:
    return {record.case.id: record for record in predicted(cases)}


def _record(case_id: str) -> Record:
    """The prediction of a case. One process predicts all cases of its batch."""
    return _batch(PLAIN if case_id not in _MARKS else MORE)[case_id]


@pytest.mark.parametrize("case_id", _each(*CASES))
def test_a_prediction_is_a_sound_record(case_id: str) -> None:
    """A prediction is valid, passes the bounds, equals its JSON, and has bytes, counts and FLOPs but no times."""
    record = _record(case_id)
    metrics = values(record)
    assert (record.status, record.reasons) == ("ok", ())
    assert impossible(record) == ()
    assert record_from_json(record_to_json(record)) == record
    assert all(metrics[name] > 0 for name in ("peak_bytes", "reserved_bytes", "operators", "kernels", "flops"))
    assert {metric.noise for metric in record.metrics.values()} == {"exact"}


@pytest.mark.parametrize("case_id", _each(*CASES))
def test_persistent_bytes_equal_the_closed_forms(case_id: str) -> None:
    """Weights, adapter and optimizer state equal the closed forms to the byte, and the last phase holds all of them."""
    record = _record(case_id)
    metrics, expected = values(record), expected_bytes(CASES[case_id])
    for name in ("weights_bytes", "adapter_weights_bytes", "optimizer_bytes"):
        assert metrics.get(name) == expected.get(name), name
    persistent = {name: size for name, size in expected.items() if name != "optimizer_bytes" or "paged" not in case_id}
    last = "peak_decode_bytes" if "generate" in case_id else "peak_optimizer_bytes"
    assert metrics[last] >= sum(persistent.values())


@pytest.mark.parametrize("case_id", _each(*CASES))
def test_memory_adds_up(case_id: str) -> None:
    """The categories add up to the peak, the peak is the highest phase, and it fits in the reserved bytes."""
    metrics = values(_record(case_id))
    categories = sum(value for name, value in metrics.items() if name.startswith("at_peak_"))
    phases = {name: value for name, value in metrics.items() if name in _PHASE_PEAKS}
    assert categories == metrics["peak_bytes"] == max(phases.values())
    assert metrics["peak_requested_bytes"] <= metrics["peak_bytes"] <= metrics["reserved_bytes"]


_PHASE_PEAKS = {f"peak_{phase}_bytes" for phase in ("forward", "backward", "optimizer", "prefill", "decode")}


@pytest.mark.parametrize(
    "case_id", _each(*(name for name, case in CASES.items() if isinstance(case.workload, FinetuneSpec)))
)
def test_training_computes_at_least_its_products(case_id: str) -> None:
    """The FLOPs of the first step are at least those that any implementation needs."""
    case, record = CASES[case_id], _record(case_id)
    assert isinstance(case.workload, FinetuneSpec)
    positions = case.workload.batch * case.workload.length
    floor = train_floor(case, positions)
    assert floor is not None
    if record.metrics["flops"].unit == "FLOP" and case.workload.data.source == "random":
        assert floor.flops <= values(record)["flops"] < 2.5 * floor.flops


@pytest.mark.nightly
def test_paged_optimizer_state_lies_outside_the_allocator() -> None:
    """Paged optimizer state of at least 100,000 numbers counts as optimizer bytes and in no peak."""
    plain, paged = (values(_record(f"tiny/{name}")) for name in ("full-8bit", "full-paged"))
    shape = FULL.model.sizes if FULL.model is not None else None
    assert shape is not None
    table = shape.vocab_size * shape.hidden_size
    assert table >= 100_000 > shape.intermediate_size * shape.hidden_size
    assert paged["optimizer_bytes"] == plain["optimizer_bytes"]
    assert plain["at_peak_optimizer_bytes"] - paged["at_peak_optimizer_bytes"] == 2 * table
    assert plain["peak_bytes"] - paged["peak_bytes"] == 2 * table
    assert paged["operators"] == plain["operators"]


@pytest.mark.nightly
def test_generation_without_a_cache_holds_no_keys_and_values() -> None:
    """Generation without a cache has no bytes of keys and values at its peak."""
    cached, off = (_record(f"tiny/generate-{name}") for name in ("batch", "no-cache"))
    assert isinstance(off.case.workload, GenerateSpec)
    assert "at_peak_kv_cache_bytes" in cached.metrics
    assert "at_peak_kv_cache_bytes" not in off.metrics


@pytest.mark.nightly
def test_a_static_cache_has_its_full_size_from_the_start() -> None:
    """A static cache holds keys and values for every token that is fed back, from the first token on."""
    record = _record("tiny/generate-static")
    assert record.case.model is not None
    shape = record.case.model.sizes
    assert shape is not None
    places = 16 + 6 - 1
    # Keys and values, of two bytes each.
    entry = 2 * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim
    assert values(record)["at_peak_kv_cache_bytes"] >= places * entry
