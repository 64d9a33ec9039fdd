"""The original report's rows as records: what the bounds refute, and the page that shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.studies.original_report.rows import REAL_TOKENS, main, report_records
from hpc_core.bounds.cost import train_floor
from hpc_core.bounds.ratio import ratio_impossible
from hpc_core.record.record import Record

ROOT = Path(__file__).parents[2]
REPORT = report_records()


def flop_per_s(record: Record) -> float:
    """The rate that a training record claims, by the tokens that it counts."""
    tokens = record.metrics["tokens"].value + record.metrics["padded_tokens"].value
    floor = train_floor(record.case, float(tokens))
    assert floor is not None
    return floor.flops / float(record.metrics["epoch_s"].value)


def test_full_fine_tuning_is_refused_in_readable_words() -> None:
    """Full fine-tuning claims 1.06 PFLOP/s, five times the data sheet's 209.5 TFLOP/s."""
    assert REPORT["full"].status == "invalid"
    assert REPORT["full"].reasons == (
        "step_s: a step of 2,048 tokens in 37.8 ms of wall time would be 1.059 PFLOP/s (40.02 TFLOP at least), "
        "5.1 times the 209.5 TFLOP/s in bfloat16 of NVIDIA's RTX Blackwell architecture paper (RTX 5090).",
    )
    assert flop_per_s(REPORT["full"]) == pytest.approx(1.06e15, rel=0.005)


def test_in_real_tokens_only_the_ratio_is_refuted() -> None:
    """Counted in real tokens the row is valid, but not next to LoRA, which cannot be slower."""
    row = REPORT["full-real-tokens"]
    assert REAL_TOKENS == row.metrics["tokens"].value == 272_271
    assert row.status == "ok"
    assert flop_per_s(row) == pytest.approx(141e12, rel=0.005)
    (reason,) = ratio_impossible(row, REPORT["lora-real-tokens"])
    assert "0.16 of it, below 0.5" in reason
    assert "they did not do the same work" in reason


def test_full_precision_does_not_fit() -> None:
    """In float32, 47.9 GiB must exist at once, but the row has 28.45 GiB."""
    assert (
        REPORT["full-fp32"]
        .reasons[0]
        .startswith("peak_bytes: 28.45 GiB is less than what must exist at once, 47.87 GiB")
    )


def test_int4_was_quantized_twice() -> None:
    """2.19 GiB is below NF4's weights and above those of NF4 with double quantization."""
    assert REPORT["int4"].reasons == (
        "peak_bytes: 2.19 GiB is less than the model's own weights, 2.21 GiB (closed form).",
    )
    assert REPORT["int4-double-quant"].status == "ok"


@pytest.mark.parametrize("name", ["fp16", "lora", "lora-gc", "lora-real-tokens", "qlora", "qlora-gc"])
def test_the_other_rows_are_valid(name: str) -> None:
    """The bounds do not refute the other rows."""
    assert REPORT[name].status == "ok"


def test_the_page_is_what_the_command_prints() -> None:
    """bench/studies/original_report/results.md is the output of `python -m bench.studies.original_report.rows`."""
    folder = ROOT / "baselines" / "nvidia-h100-80gb-hbm3-80gib" / "llama-3.2-3b"
    assert (ROOT / "bench" / "studies" / "original_report" / "results.md").read_text(encoding="utf-8") == main(folder)
