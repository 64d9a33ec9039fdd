"""The bounds refuse impossible records and nothing that was measured."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_core.bounds.check import impossible, judged, suspicious
from hpc_core.bounds.cost import decode_floor, peak_rate, prefill_floor, train_floor
from hpc_core.bounds.footprint import expected_bytes
from hpc_core.bounds.ratio import ratio_impossible
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.case.shapes import SHAPES
from hpc_core.catalogue import finetune, full, generate, llama_3b, lora, qlora
from hpc_core.record.gpus import GPUS, gpu_of
from hpc_core.record.record import Machine, Metric, Record
from tests.strategies import CPU, H100, a_record, around, busy, committed_records, peak, records, wall

FULL = finetune(llama_3b, full, variant="full-bf16", batch=4, length=512, epoch_rows=4000)
LORA = finetune(llama_3b, lora(), batch=4, length=512, epoch_rows=4000)
ANSWER = generate(llama_3b, prompt_length=100, new_tokens=64)
SHEET = GPUS["H100 80GB HBM3"]
GIB = 2**30


def claim(case: Case, machine: Machine = H100, /, **metrics: Metric) -> Record:
    """Return an ok record with these metrics."""
    return a_record(metrics, case=case, circumstances=around(machine))


ACCEPTED = {f"{record.circumstances.machine.key} {record.case.id}": record for record in committed_records()}
"""The last record of each committed history."""


def test_nothing_measured_is_refused() -> None:
    """No accepted record is impossible or suspicious, among them at least 14 of an H100."""
    assert sum(name.startswith(H100.key) for name in ACCEPTED) >= 14
    for name, record in ACCEPTED.items():
        assert impossible(record) + suspicious(record) == (), name
        assert judged(record) is record


def test_no_two_measured_records_contradict_each_other() -> None:
    """No pair of accepted records has an impossible ratio."""
    pairs = itertools.product(ACCEPTED.values(), repeat=2)
    assert [reasons for pair in pairs if (reasons := ratio_impossible(*pair))] == []


def test_lora_cannot_take_much_longer_than_full_training() -> None:
    """LoRA with tenfold times is refused, in either order; with checkpointing it is not comparable."""
    trained, adapted = (ACCEPTED[f"{H100.key} llama-3.2-3b/{variant}"] for variant in ("full-bf16", "lora"))
    times = {
        name: msgspec.structs.replace(adapted.metrics[name], value=10.0, samples=None) for name in ("step_s", "busy_s")
    }
    slower = msgspec.structs.replace(adapted, metrics={**adapted.metrics, **times})
    assert len(ratio_impossible(trained, slower)) == 1
    assert ratio_impossible(trained, slower) == ratio_impossible(slower, trained)
    checkpointed = msgspec.structs.replace(slower, case=slower.case.vary("lora-gc", checkpointing="reentrant"))
    assert ratio_impossible(trained, checkpointed) == ()


@given(records())
def test_any_record_can_be_checked(record: Record) -> None:
    """Each reason is a sentence, and a failed record stays as it is."""
    assert all(reason.endswith((".", ")", "%")) for reason in impossible(record) + suspicious(record))
    assert ratio_impossible(record, record) == ()
    if record.failure is not None:
        assert judged(record) is record


IMPOSSIBLE: dict[str, tuple[Record, str]] = {
    "wall": (
        claim(FULL, step_s=wall(0.02)),
        "step_s: a step of 2,048 tokens in 20 ms of wall time would be 2.001 PFLOP/s (40.02 TFLOP at least), 2.0 times the 989.4 TFLOP/s in bfloat16 of NVIDIA's H100 data sheet (SXM).",
    ),
    "busy": (
        claim(FULL, busy_s=busy(0.02)),
        "busy_s: a step of 2,048 tokens in 20 ms of GPU-busy time would be 2.001 PFLOP/s (40.02 TFLOP at least), 2.0 times the 989.4 TFLOP/s in bfloat16 of NVIDIA's H100 data sheet (SXM).",
    ),
    "epoch": (
        claim(LORA, step_s=wall(0.1), epoch_s=wall(10.0)),
        "epoch_s: an epoch of 1,000 steps in 10 s of wall time would be 2.685 PFLOP/s (26.85 PFLOP at least), 2.7 times the 989.4 TFLOP/s in bfloat16 of NVIDIA's H100 data sheet (SXM).",
    ),
    "token": (
        claim(ANSWER, decode_token_s=wall(0.001)),
        "decode_token_s: a decoded token in 1 ms of wall time would move 6.38 TB/s (5.95 GiB at least), 1.9 times the 3.35 TB/s of NVIDIA's H100 data sheet (SXM).",
    ),
    "no time": (
        claim(ANSWER, busy_prefill_s=wall(0.0)),
        "busy_prefill_s: the prefill in 0 s of GPU-busy time, but it takes at least 1.9 ms.",
    ),
    "below its weights": (
        claim(ANSWER, peak_bytes=peak(5 * GIB), weights_bytes=peak(6425500160)),
        "peak_bytes: 5.00 GiB is less than the model's own weights, 5.98 GiB (weights_bytes).",
    ),
    "below its state": (
        claim(FULL, peak_bytes=peak(20 * GIB)),
        "peak_bytes: 20.00 GiB is less than what must exist at once, 23.94 GiB (weights 5.98 GiB + gradient 5.98 GiB + optimizer 11.97 GiB; closed form).",
    ),
    "other weights": (
        claim(finetune(llama_3b, qlora()), weights_bytes=peak(6425500160)),
        "weights_bytes: 5.98 GiB, but these weights take 2.21 GiB (closed form): +170.7%.",
    ),
    "above the card": (
        claim(LORA, peak_bytes=peak(81 * GIB)),
        "peak_bytes: 81.00 GiB were in use at once, but NVIDIA H100 80GB HBM3 has 80.00 GiB.",
    ),
    "a larger card": (
        claim(LORA, Machine(key="x", name="NVIDIA H100 80GB HBM3", memory_bytes=96 * GIB)),
        "The machine reports 96.00 GiB of memory, but the H100 80GB HBM3 has 79.65 GiB.",
    ),
    "throughput": (
        claim(
            LORA,
            step_s=msgspec.structs.replace(wall(0.2), samples=(0.2,) * 10),
            tokens=wall(20480),
            tokens_per_s=wall(20480),
        ),
        "tokens_per_s: 20,480.0 is reported, but 20,480 tokens in 2 s (step_s) are 10,240.0.",
    ),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_an_impossible_metric_is_refused(name: str) -> None:
    """An impossible metric makes the record INVALID, with claim, limit and source in the reason."""
    record, reason = IMPOSSIBLE[name]
    assert reason in impossible(record)
    assert judged(record).status == "invalid"
    assert reason in judged(record).reasons


def test_a_cpu_has_no_data_sheet_but_memory() -> None:
    """On a CPU no time is impossible; a peak below the weights or above the machine's memory is."""
    fast = {"step_s": wall(1e-6), "decode_token_s": wall(1e-6)}
    assert impossible(claim(FULL, CPU, **fast)) == ()
    assert len(impossible(claim(LORA, CPU, peak_bytes=peak(17 * GIB)))) == 1
    assert len(impossible(claim(LORA, CPU, peak_bytes=peak(GIB)))) == 1


def test_only_listed_cards_have_a_sheet() -> None:
    """A card has a data sheet only under its whole name: laptop and Grace Hopper models do not share one."""
    names = {
        "NVIDIA GeForce RTX 5090": "RTX 5090",
        "NVIDIA A100-SXM4-80GB": "A100-SXM4-80GB",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H200": "H200",
        "NVIDIA GeForce RTX 5090 Laptop GPU": None,
        "NVIDIA GH200 480GB": None,
        "Radeon": None,
    }
    sheets = {name: gpu_of(Machine(key="gpu", name=name, memory_bytes=1)) for name in names}
    assert {name: None if sheet is None else sheet.name for name, sheet in sheets.items()} == names
    assert all(sheet.flop_per_s["bfloat16"] > 50 * sheet.bytes_per_s > 1e13 for sheet in GPUS.values())


def test_above_a_measured_ceiling_is_suspicious_only() -> None:
    """A time above this session's measured ceiling and below the data sheet's is only suspicious."""
    ceilings = {"matmul_bfloat16_flop_per_s": 700e12, "copy_bytes_per_s": 2.5e12}
    step = a_record({"step_s": wall(0.05)}, case=FULL, circumstances=around(ceilings=ceilings))
    token = a_record({"decode_token_s": wall(0.0021)}, case=ANSWER, circumstances=around(ceilings=ceilings))
    assert impossible(step) == impossible(token) == ()
    assert len(suspicious(step)) == len(suspicious(token)) == 1


shapes = st.sampled_from(["llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b", "qwen2.5-1.5b"])
methods = st.sampled_from([full, lora(), lora(targets=("down_proj",)), qlora(), qlora(double_quant=True)])


@given(shapes, methods, st.integers(1, 8), st.integers(2, 1024), st.floats(1.01, 1000))
def test_a_step_below_its_floor_is_always_refused(
    shape: str, method: Any, batch: int, length: int, times: float
) -> None:
    """On every listed card a step at its floor is possible, and any faster step is not."""
    case = finetune(ModelSpec(shape=shape), method, variant="law", batch=batch, length=length)
    floor = train_floor(case)
    assert floor is not None
    for sheet in GPUS.values():
        peak_of = peak_rate(case, sheet)
        assert peak_of is not None
        least = floor.seconds(sheet, peak_of[1])
        machine = Machine(key="gpu", name=f"NVIDIA {sheet.name}", memory_bytes=sheet.memory_bytes)
        for name in ("step_s", "busy_s"):
            assert impossible(claim(case, machine, **{name: wall(least * 1.000001)})) == ()
            assert impossible(claim(case, machine, **{name: wall(least / times)})) != ()


@given(shapes, st.integers(1, 16), st.integers(1, 2048), st.floats(1.01, 1000))
def test_a_token_below_its_floor_is_always_refused(shape: str, batch: int, length: int, times: float) -> None:
    """A decoded token or a prefill at its floor is possible, and any faster one is not."""
    case = generate(ModelSpec(shape=shape), batch=batch, prompt_length=length)
    peak_of = peak_rate(case, SHEET)
    assert peak_of is not None
    for name, floor in (("decode_token_s", decode_floor(case)), ("time_to_first_token_s", prefill_floor(case))):
        assert floor is not None
        least = floor.seconds(SHEET, peak_of[1])
        assert impossible(claim(case, **{name: wall(least * 1.000001)})) == ()
        assert impossible(claim(case, **{name: wall(least / times)})) != ()


@given(shapes, methods, st.integers(1, 8), st.integers(2, 1024))
def test_floors_rise_with_batch_and_length(shape: str, method: Any, batch: int, length: int) -> None:
    """A larger batch or a longer row needs more FLOPs and no fewer bytes."""
    case = finetune(ModelSpec(shape=shape), method, variant="law", batch=batch, length=length)
    floor, rows = train_floor(case), train_floor(case.vary("a", batch=batch + 1))
    tokens = train_floor(case.vary("b", length=length + 1))
    assert floor is not None
    assert rows is not None
    assert tokens is not None
    assert floor.flops < rows.flops
    assert floor.flops < tokens.flops
    assert floor.bytes == rows.bytes == tokens.bytes > 0
    answer = generate(ModelSpec(shape=shape), batch=batch, prompt_length=length)
    for kind in (prefill_floor, decode_floor):
        one, more, longer = (
            kind(case)
            for case in (answer, answer.vary("a", batch=batch + 1), answer.vary("b", prompt_length=length + 1))
        )
        assert one is not None
        assert more is not None
        assert longer is not None
        assert one.flops < min(more.flops, longer.flops)
        assert one.bytes <= min(more.bytes, longer.bytes)


@given(shapes, st.integers(1, 4))
def test_a_deeper_model_needs_more(shape: str, layers: int) -> None:
    """FLOPs and bytes grow linearly with the number of layers."""
    named = SHAPES[shape]
    costs = []
    try:
        for more in (0, layers, 2 * layers):
            SHAPES[shape] = msgspec.structs.replace(named, num_hidden_layers=named.num_hidden_layers + more)
            case = finetune(ModelSpec(shape=shape), full, variant="law")
            train, decode = train_floor(case), decode_floor(generate(ModelSpec(shape=shape)))
            assert train is not None
            assert decode is not None
            costs.append((train.flops, train.bytes, decode.flops, decode.bytes, expected_bytes(case)["weights_bytes"]))
    finally:
        SHAPES[shape] = named
    for least, middle, most in zip(*costs, strict=True):
        assert least < middle < most
        assert most - middle == pytest.approx(middle - least)
