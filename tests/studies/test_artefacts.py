"""The report's three artefacts: what the committed records show, and what no session may claim."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.studies.original_report.artefacts import NEEDED, artefacts
from hpc_core.bounds.ratio import checkpointing_impossible, four_bit_impossible
from hpc_core.case.case import Case
from hpc_core.catalogue import DEVICE_BOUND, FULL
from hpc_core.record.record import (
    Fact,
    Metric,
    Record,
    record_from_json,
)

BASELINES = Path(__file__).parents[2] / "baselines" / "nvidia-h100-80gb-hbm3-80gib" / "llama-3.2-3b"


@pytest.fixture
def records() -> dict[str, Record]:
    """The committed records of the H100, by variant."""
    lines = [path.read_text().splitlines()[-1] for path in sorted(BASELINES.glob("*.history.jsonl"))]
    return {record.case.id.rpartition("/")[2]: record for record in map(record_from_json, lines)}


def changed(record: Record, *, case: Case | None = None, **values: float) -> Record:
    """The record with other values of some metrics, or of another case."""
    metrics = {
        name: Metric(value=value, unit="s", noise="busy", better="lower", depends_on=("case", "stack", "machine"))
        for name, value in values.items()
    }
    return msgspec.structs.replace(record, metrics={**record.metrics, **metrics}, case=case or record.case)


def prefills(record: Record, **busy_s: float) -> dict[str, Record]:
    """Records of the device-bound cases with these GPU-busy seconds, all of them 3 % shorter than wall time."""
    cases = {case.id.rpartition("/")[2]: case for case in DEVICE_BOUND}
    return {
        name: changed(
            record,
            case=case,
            busy_prefill_s=busy_s[key],
            time_to_first_token_s=busy_s[key] / 0.97,
            busy_share_prefill=0.97,
        )
        for key, (name, case) in zip(("fp16", "nf4", "nf4_fp16"), cases.items(), strict=True)
    }


def test_every_case_that_an_artefact_needs_exists() -> None:
    """The variants are in the catalogue or among the device-bound ones, each once."""
    there = [case.id.rpartition("/")[2] for case in (*FULL, *DEVICE_BOUND)]
    assert [there.count(name) for name in NEEDED] == [1] * len(NEEDED)


def test_the_committed_records_show_the_first_two_artefacts(records: dict[str, Record]) -> None:
    """Full costs more than LoRA on the GPU, checkpointing costs time and saves memory with and without `prepare`."""
    full, qlora, four_bit = artefacts(records)
    assert (full.missing, full.refused, qlora.missing, qlora.refused) == ((), (), (), ())
    assert [row[1] for row in qlora.rows] == ["off", "on", "on", "off"]
    assert qlora.text.splitlines()[0].split("  ")[0] == "case"
    assert [row[-1] for row in four_bit.rows][:2] == ["the host's launches"] * 2


def test_qlora_rows_that_checkpointed_unasked_are_refused(records: dict[str, Record]) -> None:
    """Two rows that both ran with checkpointing, as in the report, are refused by what was seen and by their equal peaks."""
    same = records["qlora-prepare"]
    fact = {**same.audit, "checkpointing": Fact(asked="off", seen="on")}
    off = msgspec.structs.replace(
        records["qlora-prepare-nogc"], metrics=dict(same.metrics), audit=fact, status="invalid", reasons=("seen on",)
    )
    refused = artefacts({**records, "qlora-prepare-nogc": off})[1].refused
    assert refused[0] == "llama-3.2-3b/qlora-prepare-nogc: checkpointing should be off, seen was on."
    assert "peaks at 6.68 GiB" in refused[1]
    assert len(refused) == 2


def test_recomputing_every_layer_takes_no_less(records: dict[str, Record]) -> None:
    """A checkpointed step that is faster on the GPU is refused; other work, or another machine, is not compared."""
    plain, fast = records["lora"], changed(records["lora-gc"], busy_s=0.09)
    [reason] = checkpointing_impossible(plain, fast)
    assert reason.startswith("llama-3.2-3b/lora-gc takes 90 ms of GPU-busy time per step, llama-3.2-3b/lora 105 ms")
    assert checkpointing_impossible(records["qlora"], fast) == ()
    assert checkpointing_impossible(plain, records["lora-gc"]) == ()
    assert checkpointing_impossible(plain, records["generate-fp16"]) == ()


def test_device_bound_four_bit_products_are_no_faster(records: dict[str, Record]) -> None:
    """NF4 that takes as long or longer passes; NF4 in half of FP16's time did not multiply the same."""
    good = artefacts(records | prefills(records["generate-fp16"], fp16=0.18, nf4=2.2, nf4_fp16=0.2))[2]
    assert (good.missing, good.refused) == ((), ())
    assert [row[-1] for row in good.rows] == ["the host's launches"] * 2 + ["the device"] * 3
    bad = artefacts(records | prefills(records["generate-fp16"], fp16=0.18, nf4=2.2, nf4_fp16=0.09))[2]
    [reason] = bad.refused
    assert reason.startswith("llama-3.2-3b/generate-nf4-fp16-b32 takes 90 ms of GPU-busy time for its prefill")
    assert f"REFUSED: {reason}" in bad.text
    assert four_bit_impossible(records["generate-fp16"], records["lora"]) == ()


def test_a_prefill_that_waits_for_the_host_shows_nothing(records: dict[str, Record]) -> None:
    """Below nine tenths of the time the case is not device-bound, and the artefact says by how much and what to do."""
    there = prefills(records["generate-fp16"], fp16=0.18, nf4=2.2, nf4_fp16=0.2)
    there["generate-fp16-b32"] = changed(there["generate-fp16-b32"], busy_share_prefill=0.7)
    [reason] = artefacts(records | there)[2].refused
    assert "works 70% of the time to the first token, below 90%" in reason
    assert reason.endswith("Take a larger batch.")


def test_what_did_not_run_is_missing(records: dict[str, Record]) -> None:
    """Without its records an artefact judges nothing and names them."""
    there = {name: record for name, record in records.items() if name != "lora" and not name.endswith("-b32")}
    full, _, four_bit = artefacts(there)
    assert (full.missing, full.refused) == (("lora",), ())
    assert four_bit.missing == ("generate-fp16-b32", "generate-nf4-b32", "generate-nf4-fp16-b32")
