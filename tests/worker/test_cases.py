"""Every tiny case runs in this process: records are sound, and exact metrics are equal in every run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hpc_core.builders.causal_lm import causal_lm
from hpc_core.builders.data.batching import batches
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.case import Case
from hpc_core.case.shapes import SHAPES
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.catalogue import TINY_DATA, catalogue
from hpc_core.record.job import Measure, Retime
from hpc_core.record.metrics import canaries_of
from hpc_core.record.record import Record, record_from_json, record_to_json
from hpc_core.record.repeats import disturbed, merged
from tests.tiny_cases import TINY_CASES, measured, measured_once, tiny_record

_PHASES = [
    "build", "data", "warm-up", "measure", "host", "memory", "counters", "audit", "busy", "profile", "equivalence", "record",
    "done",
]  # fmt: skip


def _exact(record: Record) -> dict[str, float | int]:
    return {name: metric.value for name, metric in record.metrics.items() if metric.noise == "exact" and metric.gated}


@pytest.mark.parametrize(
    "case_id",
    # By day tests/audit/test_clean.py runs the soak.
    [pytest.param(name, marks=pytest.mark.nightly if "soak" in name else ()) for name in TINY_CASES],
)
def test_a_tiny_case_gives_a_sound_record(case_id: str) -> None:
    """The record is ok, every fact holds, phases come in order, and the record equals its JSON."""
    record, phases = measured_once(case_id)
    assert record.status == "ok", record.reasons
    assert record.case == TINY_CASES[case_id]
    assert all(fact.holds for fact in record.audit.values())
    assert phases == _PHASES
    assert record_from_json(record_to_json(record)) == record
    assert record_from_json(record_to_json(record, indent=2)) == record
    assert all(math.isfinite(loss) for loss in record.losses)
    assert len(_exact(record)) >= 12


@pytest.mark.parametrize(("case_id", "timed"), [("tiny/qlora-gc", "step_s"), ("tiny/generate-nf4", "query_s")])
def test_a_further_process_measures_what_can_be_merged(case_id: str, timed: str) -> None:
    """Without a GPU a further process only times steps or queries, and merges into the first one's record."""
    first = tiny_record(case_id)
    record, phases = measured(TINY_CASES[case_id], Retime())
    assert phases == ["build", "data", "warm-up", "measure", "busy", "record", "done"]
    assert "peak_bytes" not in record.metrics
    both = merged(first, [record])
    assert both.status == "ok", both.reasons
    # A time that was disturbed in the first process is the second one's.
    replaced = {each for name in disturbed(first.metrics) for each in (name, canaries_of(name))}
    assert both.metrics.keys() == first.metrics.keys()
    assert [name for name, each in both.metrics.items() if each != first.metrics[name] and name not in replaced] == []
    undisturbed = [{timed} - disturbed(each.metrics) for each in (first, record)]
    assert [set(process.wall_s) & {timed} for process in both.processes] == undisturbed


FED = next(case for case in TINY_DATA if case.id == "tiny/data-w0").vary("data-few", steps=5)


@pytest.mark.parametrize(
    "case",
    [TINY_CASES["tiny/qlora-gc"], TINY_CASES["tiny/generate-nf4"], pytest.param(FED, marks=pytest.mark.nightly)],
    ids=lambda case: case.id,
)
def test_a_retimed_process_measures_every_time_again(case: Case) -> None:
    """A retimed process has every sampled time of the full one, with as many samples, but no memory and no operators."""
    first, _ = measured(case, Measure(profile=False))
    record, phases = measured(case, Retime())
    assert (first.status, record.status) == ("ok", "ok"), record.reasons
    feed = ["feed"] if case is FED else []
    assert phases == ["build", "data", "warm-up", "measure", "busy", *feed, "record", "done"]
    sampled = {name: len(metric.samples) for name, metric in first.metrics.items() if metric.samples is not None}
    assert {name: len(record.metrics[name].samples or ()) for name in sampled} == sampled
    assert not {"peak_bytes", "operators", "flops"} & record.metrics.keys()
    counts = {name for name, metric in record.metrics.items() if metric.noise == "exact" and metric.gated}
    assert {"weights_bytes", "tokens"} <= counts
    assert {name: record.metrics[name].value for name in counts} == {name: first.metrics[name].value for name in counts}


@pytest.mark.parametrize(
    ("case", "fact", "seen", "status"),
    [
        (
            TINY_CASES["tiny/lora-tuned"].vary("lora-captured", graph=True),
            "engine_graph",
            "a CUDA graph needs a GPU",
            "invalid",
        ),
        (TINY_CASES["tiny/lora-tuned"], "engine", "tuned", "ok"),
    ],
    ids=["fallen", "sound"],
)
def test_a_further_process_audits_the_engines_switches(case: Case, fact: str, seen: str, status: str) -> None:
    """A further process whose engine fell back is INVALID, so its time is never taken for the engine's."""
    record, _ = measured(case, Retime())
    assert seen in str(record.audit[fact].seen)
    assert record.status == status


@pytest.mark.parametrize("case_id", TINY_CASES)
def test_memory_adds_up(case_id: str) -> None:
    """Categories add up to the peak, which is that of the highest phase, and the weights at the peak are the model's."""
    values = {
        name: int(metric.value) for name, metric in tiny_record(case_id).metrics.items() if name.endswith("_bytes")
    }
    categories = {name: value for name, value in values.items() if name.startswith("at_peak_")}
    phases = {name: value for name, value in values.items() if name.startswith("peak_") and name != "peak_bytes"}
    assert sum(categories.values()) == max(phases.values()) == values["peak_bytes"]
    assert categories["at_peak_weights_bytes"] == values["weights_bytes"]
    if isinstance(TINY_CASES[case_id].workload, FinetuneSpec):
        assert set(phases) == {"peak_forward_bytes", "peak_backward_bytes", "peak_optimizer_bytes"}
        assert categories["at_peak_optimizer_bytes"] == values["optimizer_bytes"]
        assert categories.get("at_peak_adapter_bytes") == values.get("adapter_weights_bytes")
    else:
        assert set(phases) == {"peak_prefill_bytes", "peak_decode_bytes"}
        # Keys and values of 24 prompt tokens, in 16 bits.
        shape = SHAPES["tiny"]
        assert (
            categories["at_peak_kv_cache_bytes"]
            == 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 24 * 2
        )


@pytest.mark.parametrize("case_id", TINY_CASES)
def test_no_bytes_are_unexplained(case_id: str) -> None:
    """Weights, adapter, gradients, optimizer state and KV cache take exactly the bytes of their closed forms."""
    unexplained = tiny_record(case_id).metrics["unexplained_bytes"]
    adapter = TINY_CASES[case_id].adapter is not None
    categories = 2 + (1 + adapter) * isinstance(TINY_CASES[case_id].workload, FinetuneSpec)
    assert (unexplained.value, unexplained.gated) == (0, True)
    assert unexplained.note == f"measured minus closed form: equal in {categories} categories"


def test_an_extra_buffer_is_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of 1000 bytes gives 1000 unexplained bytes, and the note names their category."""

    def with_a_buffer(*args: Any, **named: Any) -> torch.nn.Module:
        model = causal_lm(*args, **named)
        model.register_buffer("forgotten", torch.zeros(250))
        return model

    monkeypatch.setattr("hpc_core.builders.assemble.causal_lm", with_a_buffer)
    unexplained = measured(TINY_CASES["tiny/full-bf16"])[0].metrics["unexplained_bytes"]
    assert (unexplained.value, unexplained.note) == (1000, "measured minus closed form: weights +1,000")


@pytest.mark.parametrize(
    "case_id", ["tiny/generate-nf4-dq", "tiny/lora-padded", "tiny/qlora-prepare", "tiny/full-fp32"]
)
def test_exact_metrics_are_equal_in_the_same_process(case_id: str) -> None:
    """A second run in this process, after many others, gives the same exact metrics."""
    assert _exact(measured(TINY_CASES[case_id])[0]) == _exact(tiny_record(case_id))


def test_checkpointing_costs_work_and_saves_memory() -> None:
    """Checkpointing computes more and holds fewer activations; losses stay equal."""
    plain, checkpointed = tiny_record("tiny/lora"), tiny_record("tiny/lora-gc")
    assert _exact(checkpointed)["flops"] > _exact(plain)["flops"]
    assert _exact(checkpointed)["at_peak_activations_bytes"] < _exact(plain)["at_peak_activations_bytes"] / 2
    assert checkpointed.losses[:2] == plain.losses[:2]
    assert (checkpointed.audit["checkpointing"].seen, plain.audit["checkpointing"].seen) == ("on", "off")


def test_quantization_shrinks_weights_and_leaves_the_flops() -> None:
    """NF4 takes less than int8 and int8 less than half precision; FLOPs are equal."""
    records = {name: _exact(tiny_record(f"tiny/generate-{name}")) for name in ("fp16", "bf16", "nf4", "int8")}
    assert records["nf4"]["weights_bytes"] < records["int8"]["weights_bytes"] < records["fp16"]["weights_bytes"]
    assert records["fp16"]["weights_bytes"] == records["bf16"]["weights_bytes"]
    assert len({exact["flops"] for exact in records.values()}) == 1
    assert _exact(tiny_record("tiny/qlora"))["flops"] == _exact(tiny_record("tiny/lora"))["flops"]


@pytest.mark.parametrize("case_id", ["tiny/lora-padded", "tiny/lora-max-length", "tiny/lora-packed", "tiny/lora"])
def test_tokens_are_the_datas_own(case_id: str) -> None:
    """Tokens and padding of the record are those counted in the batches."""
    workload = TINY_CASES[case_id].workload
    assert isinstance(workload, FinetuneSpec)
    count = workload.batch * workload.steps if workload.data.source == "random" else None
    length = None if workload.packing else workload.length
    rows = token_rows(workload.data, count=count, length=length, vocab_size=1024, tokenizer=None)
    chosen = list(batches(rows, workload))[: workload.steps]
    places = sum(len(row) for batch in chosen for row in batch.ids)
    real = places - sum(mask.count(0) for batch in chosen for mask in batch.mask or [])
    exact = _exact(tiny_record(case_id))
    assert (exact["tokens"], exact["padded_tokens"]) == (real, places - real)
    assert (exact["padded_tokens"] > 0) is (workload.padding != "none")
    rate = tiny_record(case_id).metrics["tokens_per_s"].value
    assert rate * sum(tiny_record(case_id).wall_samples) == pytest.approx(real)


def test_a_padded_cases_memory_is_that_of_its_widest_batch() -> None:
    """With ragged rows the peak is that of padding every batch to the widest."""
    padded, widest = _exact(tiny_record("tiny/lora-padded")), _exact(tiny_record("tiny/lora-max-length"))
    assert padded["peak_bytes"] == widest["peak_bytes"]
    assert padded["flops"] < 5 * widest["flops"]


@pytest.mark.parametrize("name", ["generate-fp16", "generate-nf4"])
def test_a_generation_record_holds_its_answers_and_times(name: str) -> None:
    """A record has one answer and one time per prompt, one time per decoded token, and the requested tokens."""
    record = tiny_record(f"tiny/{name}")
    workload = record.case.workload
    assert isinstance(workload, GenerateSpec)
    assert [len(answer.split()) for answer in record.answers] == [workload.new_tokens] * workload.prompts
    assert len(record.wall_samples) == workload.prompts
    decode = record.metrics["decode_token_s"].samples
    assert decode is not None
    assert len(decode) == workload.prompts * (workload.new_tokens - 1)
    assert (_exact(record)["tokens"], _exact(record)["prompt_tokens"]) == (16, 48)
    first = record.metrics["time_to_first_token_s"].samples
    assert first is not None
    assert all(0 < early < whole for early, whole in zip(first, record.wall_samples, strict=True))


def test_a_cpu_gates_what_is_exact_and_the_times_of_the_work() -> None:
    """On a CPU exact metrics are gated, and the times of a step or a query, which a canary stands beside."""
    for case_id in TINY_CASES:
        metrics = tiny_record(case_id).metrics
        times = {name for name, metric in metrics.items() if metric.gated} - set(_exact(tiny_record(case_id)))
        of_work = {"step_s"} if "step_s" in metrics else {"query_s", "time_to_first_token_s", "decode_token_s"}
        assert times <= of_work, case_id
        assert all("waited for a core" in str(metrics[name].note) for name in of_work - times)
        for name in times:
            canary = metrics["host_canary_s"].value
            assert metrics[canaries_of(name)].value == pytest.approx(metrics[name].value / canary, rel=2), name


def test_a_full_case_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-size case is refused without a GPU, before anything is built."""
    import torch

    from hpc_core.case.errors import SpecError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"llama-3\.2-3b/lora needs a CUDA GPU"):
        measured(catalogue()["llama-3.2-3b/lora"])
