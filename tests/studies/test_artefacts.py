"""The original report's three artefacts: what the committed records show, and what no session may claim."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from bench.studies.original_report.artefacts import NEEDED, artefacts
from hpc_core.bounds.ratio import checkpointing_impossible, four_bit_impossible
from hpc_core.case.case import Case
from hpc_core.catalogue import DEVICE_BOUND, FULL
from hpc_core.record.record import Fact, Metric, Record, record_from_json

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
    """Records of the device-bound cases with these GPU-busy seconds, each 97 % of wall time."""
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
    """Each variant is in the catalogue or among the device-bound ones once."""
    variants = [case.id.rpartition("/")[2] for case in (*FULL, *DEVICE_BOUND)]
    assert [variants.count(name) for name in NEEDED] == [1] * len(NEEDED)


def test_the_committed_records_show_the_first_two_artefacts(records: dict[str, Record]) -> None:
    """Full fine-tuning costs more GPU time than LoRA; checkpointing costs time and saves memory with and without `prepare`."""
    full, qlora, four_bit = artefacts(records)
    assert (full.missing, full.refused, qlora.missing, qlora.refused) == ((), (), (), ())
    assert [row[1] for row in qlora.rows] == ["off", "on", "on", "off"]
    assert qlora.text.splitlines()[0].split("  ")[0] == "case"
    assert [row[-1] for row in four_bit.rows][:2] == ["the host's launches"] * 2


def test_qlora_rows_that_checkpointed_unasked_are_refused(records: dict[str, Record]) -> None:
    """Two rows that both ran with checkpointing, as in the report, are refused by the audit and by their equal peaks."""
    same = records["qlora-prepare"]
    fact = {**same.audit, "checkpointing": Fact(asked="off", seen="on")}
    off = msgspec.structs.replace(
        records["qlora-prepare-nogc"], metrics=dict(same.metrics), audit=fact, status="invalid", reasons=("seen on",)
    )
    refused = artefacts({**records, "qlora-prepare-nogc": off})[1].refused
    assert refused[0] == "llama-3.2-3b/qlora-prepare-nogc: checkpointing should be off, seen was on."
    assert "peaks at 6.68 GiB" in refused[1]
    assert len(refused) == 2


def test_a_faster_checkpointed_step_is_refused(records: dict[str, Record]) -> None:
    """A checkpointed step that is faster on the GPU is refused; other work or another machine is not compared."""
    plain, fast = records["lora"], changed(records["lora-gc"], busy_s=0.09)
    [reason] = checkpointing_impossible(plain, fast)
    assert reason.startswith("llama-3.2-3b/lora-gc takes 90 ms of GPU-busy time per step, llama-3.2-3b/lora 105 ms")
    assert checkpointing_impossible(records["qlora"], fast) == ()
    assert checkpointing_impossible(plain, records["lora-gc"]) == ()
    assert checkpointing_impossible(plain, records["generate-fp16"]) == ()


def test_a_faster_four_bit_prefill_is_refused(records: dict[str, Record]) -> None:
    """NF4 that takes as long as FP16 or longer passes; half of FP16's time is refused as other work."""
    good = artefacts(records | prefills(records["generate-fp16"], fp16=0.18, nf4=2.2, nf4_fp16=0.2))[2]
    assert (good.missing, good.refused) == ((), ())
    assert [row[-1] for row in good.rows] == ["the host's launches"] * 2 + ["the device"] * 3
    bad = artefacts(records | prefills(records["generate-fp16"], fp16=0.18, nf4=2.2, nf4_fp16=0.09))[2]
    [reason] = bad.refused
    assert reason.startswith("llama-3.2-3b/generate-nf4-fp16-b32 takes 90 ms of GPU-busy time for its prefill")
    assert f"REFUSED: {reason}" in bad.text
    assert four_bit_impossible(records["generate-fp16"], records["lora"]) == ()


def test_a_host_bound_prefill_is_refused(records: dict[str, Record]) -> None:
    """A GPU busy below 90 % of the time is not device-bound; the artefact says so and what to do."""
    records_by_variant = prefills(records["generate-fp16"], fp16=0.18, nf4=2.2, nf4_fp16=0.2)
    records_by_variant["generate-fp16-b32"] = changed(records_by_variant["generate-fp16-b32"], busy_share_prefill=0.7)
    [reason] = artefacts(records | records_by_variant)[2].refused
    assert "works 70% of the time to the first token, below 90%" in reason
    assert reason.endswith("Take a larger batch.")


def test_an_artefact_without_its_records_names_them(records: dict[str, Record]) -> None:
    """An artefact without its records judges nothing and names them."""
    records_by_variant = {
        name: record for name, record in records.items() if name != "lora" and not name.endswith("-b32")
    }
    full, _, four_bit = artefacts(records_by_variant)
    assert (full.missing, full.refused) == (("lora",), ())
    assert four_bit.missing == ("generate-fp16-b32", "generate-nf4-b32", "generate-nf4-fp16-b32")
