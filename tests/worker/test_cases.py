"""Every tiny case performed for real, in this process: sound records, exact numbers equal in every run."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.builders.causal_lm import causal_lm
from hpc_core.builders.data.batching import batches
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.case import Case, case_to_json
from hpc_core.case.shapes import SHAPES
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.catalogue import TINY, TINY_DATA, catalogue
from hpc_core.record.job import Event, Job, Kind, Measure, Phase, Repeat, Retime
from hpc_core.record.record import Record, record_from_json, record_to_json
from hpc_core.record.repeats import merged
from hpc_core.worker.perform import perform

# The soak is short here: its two hundred steps are tests/worker/test_soak.py's.
CASES = {case.id: case.vary("lora-soak", steps=50) if case.id == "tiny/lora-soak" else case for case in TINY}
_BUILD = [
    "build",
    "data",
    "warm-up",
    "measure",
    "memory",
    "counters",
    "audit",
    "busy",
    "profile",
    "equivalence",
    "record",
    "done",
]


def _perform(case: Case) -> tuple[Record, list[Event]]:
    events: list[Event] = []
    return perform(Job(case=case, launched="inline"), events.append), events


@functools.cache
def _once(case_id: str) -> tuple[Record, tuple[Event, ...]]:
    record, events = _perform(CASES[case_id])
    return record, tuple(events)


def _exact(record: Record) -> dict[str, float | int]:
    return {name: metric.value for name, metric in record.metrics.items() if metric.noise == "exact" and metric.gated}


@pytest.mark.parametrize("case_id", CASES)
def test_a_tiny_case_gives_a_sound_record(case_id: str) -> None:
    """Nothing voids the run, every audit holds, phases come in order, and the record equals its JSON."""
    record, events = _once(case_id)
    assert record.status == "ok", record.reasons
    assert record.case == CASES[case_id]
    assert record.reasons == ()
    assert all(fact.holds for fact in record.audit.values())
    phases = [event.name for event in events if isinstance(event, Phase)]
    assert phases == _BUILD
    assert record_from_json(record_to_json(record)) == record
    assert record_from_json(record_to_json(record, indent=2)) == record
    assert all(math.isfinite(loss) for loss in record.losses)
    assert len(_exact(record)) >= 12


@pytest.mark.parametrize(("case_id", "timed"), [("tiny/qlora-gc", "step_s"), ("tiny/generate-nf4", "query_s")])
def test_a_further_process_measures_what_can_be_merged(case_id: str, timed: str) -> None:
    """Without a GPU it times steps or queries and leaves out all other instruments; its sizes are the first process's."""
    first = _once(case_id)[0]
    events: list[Event] = []
    record = perform(Job(case=CASES[case_id], launched="inline", kind=Repeat()), events.append)
    phases = [event.name for event in events if isinstance(event, Phase)]
    assert phases == ["build", "data", "warm-up", "measure", "record", "done"]
    assert "peak_bytes" not in record.metrics
    both = merged(first, [record])
    assert both.status == "ok", both.reasons
    assert both.metrics == first.metrics
    assert [set(process.wall_s) >= {timed} for process in both.processes] == [True, True]


FED = next(case for case in TINY_DATA if case.id == "tiny/data-w0").vary("data-few", steps=5)


@pytest.mark.parametrize("case", [CASES["tiny/qlora-gc"], CASES["tiny/generate-nf4"], FED], ids=lambda case: case.id)
def test_a_process_that_is_timed_again_takes_every_time_of_the_full_one(case: Case) -> None:
    """By the same code and over as many steps or queries: what is compared in pairs is all there; no memory, no operators."""
    first = perform(Job(case=case, launched="inline", kind=Measure(profile=False)), lambda _: None)
    events: list[Event] = []
    record = perform(Job(case=case, launched="inline", kind=Retime()), events.append)
    assert (first.status, record.status) == ("ok", "ok"), record.reasons
    phases = [event.name for event in events if isinstance(event, Phase)]
    feed = ["feed"] if case is FED else []
    assert phases == ["build", "data", "warm-up", "measure", "busy", *feed, "record", "done"]
    sampled = {name: len(metric.samples) for name, metric in first.metrics.items() if metric.samples is not None}
    assert {name: len(record.metrics[name].samples or ()) for name in sampled} == sampled
    assert not {"peak_bytes", "operators", "flops"} & record.metrics.keys()
    counts = {name for name, metric in record.metrics.items() if metric.noise == "exact" and metric.gated}
    assert {"weights_bytes", "tokens"} <= counts
    assert {name: record.metrics[name].value for name in counts} == {name: first.metrics[name].value for name in counts}


@pytest.mark.parametrize(
    ("case", "seen"),
    [
        (CASES["tiny/lora-tuned"].vary("lora-captured", graph=True), ("engine_graph", "a CUDA graph needs a GPU")),
        (CASES["tiny/lora-tuned"], ("engine", "tuned")),
    ],
    ids=["fallen", "sound"],
)
@pytest.mark.parametrize("further", [Retime(), Repeat()], ids=["retime", "repeat"])
def test_an_engine_that_fell_back_is_never_timed_as_itself(case: Case, seen: tuple[str, str], further: Kind) -> None:
    """Any further process looks whether each switch is on, as the full one does: else its time would be another program's."""
    record = perform(Job(case=case, kind=further, launched="inline"), lambda _: None)
    name, said = seen
    assert said in str(record.audit[name].seen)
    assert record.status == ("ok" if record.audit[name].holds else "invalid")
    assert (record.status == "invalid") == (name == "engine_graph")


@pytest.mark.parametrize("case_id", CASES)
def test_memory_adds_up(case_id: str) -> None:
    """Categories add up to the peak, the peak is the highest phase, and the weights at the peak are the model's."""
    values = {name: int(metric.value) for name, metric in _once(case_id)[0].metrics.items() if name.endswith("_bytes")}
    categories = {name: value for name, value in values.items() if name.startswith("at_peak_")}
    phases = {name: value for name, value in values.items() if name.startswith("peak_") and name != "peak_bytes"}
    assert sum(categories.values()) == max(phases.values()) == values["peak_bytes"]
    assert categories["at_peak_weights_bytes"] == values["weights_bytes"]
    if isinstance(CASES[case_id].workload, FinetuneSpec):
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


@pytest.mark.parametrize("case_id", CASES)
def test_nothing_is_left_unexplained(case_id: str) -> None:
    """Weights, adapter, gradients, optimizer state and KV cache take what their closed forms say, to the byte."""
    unexplained = _once(case_id)[0].metrics["unexplained_bytes"]
    adapter = CASES[case_id].adapter is not None
    categories = 2 + (1 + adapter) * isinstance(CASES[case_id].workload, FinetuneSpec)
    assert (unexplained.value, unexplained.gated) == (0, True)
    assert unexplained.note == f"measured minus closed form: equal in {categories} categories"


def test_a_buffer_that_nobody_asked_for_is_unexplained_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand bytes more in the model's weights are a thousand unexplained bytes, and the note says whose."""

    def with_a_buffer(*args: Any, **named: Any) -> torch.nn.Module:
        model = causal_lm(*args, **named)
        model.register_buffer("forgotten", torch.zeros(250))
        return model

    monkeypatch.setattr("hpc_core.builders.assemble.causal_lm", with_a_buffer)
    unexplained = _perform(CASES["tiny/full-bf16"])[0].metrics["unexplained_bytes"]
    assert (unexplained.value, unexplained.note) == (1000, "measured minus closed form: weights +1,000")


@pytest.mark.parametrize(
    "case_id", ["tiny/generate-nf4-dq", "tiny/lora-padded", "tiny/qlora-prepare", "tiny/full-fp32"]
)
def test_exact_metrics_are_equal_in_the_same_process(case_id: str) -> None:
    """A second run of a case in this process, after many others, gives the same bytes and counts."""
    assert _exact(_perform(CASES[case_id])[0]) == _exact(_once(case_id)[0])


@pytest.mark.parametrize("case_id", ["tiny/qlora-gc"])
def test_exact_metrics_are_equal_in_a_fresh_process(case_id: str, tmp_path: Path) -> None:
    """A fresh interpreter gives the same bytes and counts as this one."""
    program = (
        "import sys; from pathlib import Path; from hpc_core.record.job import Job\n"
        "from hpc_core.worker.perform import perform\n"
        "from hpc_core.record.record import record_to_json; from hpc_core.case.case import case_from_json\n"
        "record = perform(Job(case=case_from_json(sys.argv[1])), lambda event: None)\n"
        "Path(sys.argv[2]).write_bytes(record_to_json(record))"
    )
    out = tmp_path / "record.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program, case_to_json(CASES[case_id]).decode(), str(out)]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert _exact(record_from_json(out.read_bytes())) == _exact(_once(case_id)[0])


def test_checkpointing_costs_work_and_saves_memory() -> None:
    """With checkpointing more is computed and less is held; weights, adapter and losses stay."""
    plain, checkpointed = _once("tiny/lora")[0], _once("tiny/lora-gc")[0]
    assert _exact(checkpointed)["flops"] > _exact(plain)["flops"]
    assert _exact(checkpointed)["at_peak_activations_bytes"] < _exact(plain)["at_peak_activations_bytes"] / 2
    assert checkpointed.losses[:2] == plain.losses[:2]
    assert (checkpointed.audit["checkpointing"].seen, plain.audit["checkpointing"].seen) == ("on", "off")


def test_quantization_shrinks_weights_and_leaves_the_flops() -> None:
    """int8 takes more than NF4 and less than half precision; all of them compute the same products."""
    records = {name: _exact(_once(f"tiny/generate-{name}")[0]) for name in ("fp16", "bf16", "nf4", "int8")}
    assert records["nf4"]["weights_bytes"] < records["int8"]["weights_bytes"] < records["fp16"]["weights_bytes"]
    assert records["fp16"]["weights_bytes"] == records["bf16"]["weights_bytes"]
    assert len({found["flops"] for found in records.values()}) == 1
    assert _exact(_once("tiny/qlora")[0])["flops"] == _exact(_once("tiny/lora")[0])["flops"]


@pytest.mark.parametrize("case_id", ["tiny/lora-padded", "tiny/lora-max-length", "tiny/lora-packed", "tiny/lora"])
def test_tokens_are_the_datas_own(case_id: str) -> None:
    """Tokens and padding of the record are those of the data's batches, counted from the batches themselves."""
    workload = CASES[case_id].workload
    assert isinstance(workload, FinetuneSpec)
    count = workload.batch * workload.steps if workload.data.source == "random" else None
    length = None if workload.packing else workload.length
    rows = token_rows(workload.data, count=count, length=length, vocab_size=1024, tokenizer=None)
    chosen = list(batches(rows, workload))[: workload.steps]
    places = sum(len(row) for batch in chosen for row in batch.ids)
    real = places - sum(mask.count(0) for batch in chosen for mask in batch.mask or [])
    exact = _exact(_once(case_id)[0])
    assert (exact["tokens"], exact["padded_tokens"]) == (real, places - real)
    assert (exact["padded_tokens"] > 0) is (workload.padding != "none")
    rate = _once(case_id)[0].metrics["tokens_per_s"].value
    assert rate * sum(_once(case_id)[0].wall_samples) == pytest.approx(real)


def test_a_padded_cases_memory_is_that_of_its_widest_batch() -> None:
    """With ragged rows the peak is that of the widest batch: as high as with every batch padded to it."""
    padded, widest = _exact(_once("tiny/lora-padded")[0]), _exact(_once("tiny/lora-max-length")[0])
    assert padded["peak_bytes"] == widest["peak_bytes"]
    assert padded["flops"] < 5 * widest["flops"]


@pytest.mark.parametrize("name", ["generate-fp16", "generate-nf4"])
def test_a_generation_record_holds_its_answers_and_times(name: str) -> None:
    """One answer and one time a prompt, one time a decoded token, and tokens as asked."""
    record = _once(f"tiny/{name}")[0]
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


def test_only_what_repeats_is_gated_on_a_cpu() -> None:
    """No wall time, no resident memory and no derived rate is ever judged."""
    for case_id in CASES:
        gated = {name for name, metric in _once(case_id)[0].metrics.items() if metric.gated}
        assert gated == set(_exact(_once(case_id)[0])), case_id
        assert not gated & {"host_peak_bytes", "cold_start_s", "epoch_s", "tokens_per_s", "step_s", "query_s"}


def test_a_full_case_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full-size case says that it needs a GPU before it builds anything."""
    import torch

    from hpc_core.case.errors import SpecError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SpecError, match=r"llama-3\.2-3b/lora needs a CUDA GPU"):
        _perform(catalogue()["llama-3.2-3b/lora"])
