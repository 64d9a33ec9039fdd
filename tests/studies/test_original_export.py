"""The original report's two files, written from records: its words and units, and no number that was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from bench.studies.original_report.__main__ import main
from bench.studies.original_report.export import FINETUNE_FILE, INFERENCE_FILE, original_files
from bench.studies.original_report.protocol import protocol
from hpc_core.case.case import Case
from hpc_core.case.limits import GiB
from hpc_core.case.parts import DataSpec, ModelSpec
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.files import write_record
from hpc_core.record.record import Metric, Record, record_from_json, record_to_json
from tests.commands import exit_code
from tests.strategies import a_record, failed_record, peak, wall


def seconds(*samples: float) -> Metric:
    return Metric(
        value=sorted(samples)[len(samples) // 2], samples=samples, unit="s", noise="wall", better="lower",
        depends_on=("case",), gated=False,
    )  # fmt: skip


def of(variant: str) -> Case:
    return next(case for case in protocol() if case.id.endswith(f"/{variant}"))


def generated() -> Record:
    metrics = {"query_s": seconds(4.0, 4.0, 7.0), "tokens_per_s": wall(102.4), "peak_bytes": peak(6 * GiB)}
    return a_record(metrics, case=of("original-fp16"))


def trained(steps: int) -> Record:
    metrics = {"step_s": seconds(*[0.25] * steps), "epoch_s": wall(250.0), "peak_bytes": peak(16 * GiB)}
    return a_record(metrics, case=of("original-lora"))


def test_a_latency_is_the_mean_of_all_queries() -> None:
    """Latency is the average of all queries, as its name says: 5 s for 4, 4 and 7 s. The file says what its GB are."""
    file = original_files([generated()])[INFERENCE_FILE]
    assert "1024**3" in file["units"]["peak_memory_gb"]
    method = file["methods"]["original-fp16"]
    assert (method["avg_latency"], method["throughput_tokens_per_sec"], method["peak_memory_gb"]) == (5.0, 102.4, 6.0)
    assert method["extrapolated"] is False


def test_whole_epochs_are_summed_and_fewer_steps_extrapolated() -> None:
    """2000 measured steps are two epochs; 10 are extrapolated to two, and the file says so."""
    whole = original_files([trained(2000)])[FINETUNE_FILE]["methods"]["original-lora"]
    assert (whole["total_time"], whole["time_per_epoch"], whole["extrapolated"]) == (500.0, 250.0, False)
    part = original_files([trained(10)])[FINETUNE_FILE]["methods"]["original-lora"]
    assert (part["total_time"], part["time_per_epoch"], part["extrapolated"]) == (500.0, 250.0, True)


def test_a_failed_row_gives_its_reason() -> None:
    """A row that ran out of memory has its reason and no number."""
    [method] = original_files([failed_record()])[FINETUNE_FILE]["methods"].values()
    assert method["status"] == "failed"
    assert "80.1 GiB" in method["reason"]
    assert "peak_memory_gb" not in method


def test_the_protocol_is_the_reports() -> None:
    """The protocol has 500 answers of 512 tokens two ways, and two epochs of 4000 rows in padded batches of 4 five ways."""
    answers = [case.workload for case in protocol() if isinstance(case.workload, GenerateSpec)]
    assert [(each.prompts, each.new_tokens, each.batch) for each in answers] == [(500, 512, 1)] * 2
    training = [case.workload for case in protocol() if isinstance(case.workload, FinetuneSpec)]
    assert {(each.batch, each.length, each.padding, each.steps, each.data.rows) for each in training} == {
        (4, 512, "max_length", 2000, 4000)
    }
    assert len(training) == 5


@pytest.mark.parametrize("weights", [None, ModelSpec(weights="hub", path="meta-llama/Llama-3.2-3B-Instruct")])
def test_true_weights_use_the_real_texts(weights: ModelSpec | None) -> None:
    """Random weights go with recorded lengths, true ones with the data sets themselves."""
    sources = {case.workload.data.source for case in protocol(weights) if isinstance(case.workload, GenerateSpec)}
    assert sources == {DataSpec(source="trace" if weights is None else "hub", name="gsm8k").source}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nowhere", "--out", "out"], "no such folder"),
        (["export", ".", "--out", "out"], "holds no record"),
        (["run", "--out", "out", "--short", "--model", "x"], "drop --model or --short"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A mistake is one line and exit code 2."""
    monkeypatch.chdir(tmp_path)
    assert exit_code(main, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.nightly
def test_the_short_protocol_resumes_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Seven rows on a tiny model give the two files; after two records are removed or record, only those run again."""
    out = tmp_path / "report"
    assert exit_code(main, "run", "--out", out, "--short") == 0
    inference = json.loads((out / "baseline_inference_metrics.json").read_text())["methods"]
    assert set(inference) == {"original-fp16", "original-nf4"}
    training = json.loads((out / "baseline_finetune_metrics.json").read_text())["methods"]
    assert len(training) == 5
    assert not any(method["extrapolated"] for method in training.values())
    assert "[7/7]" in capsys.readouterr().err
    (out / "records" / "tiny" / "original-lora.json").unlink()
    other = out / "records" / "tiny" / "original-full.json"
    record = record_from_json(other.read_bytes())
    other.write_bytes(
        record_to_json(msgspec.structs.replace(record, case=msgspec.structs.replace(record.case, seed=7)))
    )
    assert exit_code(main, "run", "--out", out, "--short") == 0
    progress = capsys.readouterr().err
    assert progress.count("measured already") == 5
    assert progress.count(": running") == 2


def test_an_export_into_its_own_folder_can_be_repeated(tmp_path: Path) -> None:
    """The files of the export before are no records, and are left out."""
    write_record(tmp_path / "tiny" / "lora.json", failed_record())
    for _ in range(2):
        assert exit_code(main, "export", tmp_path, "--out", tmp_path) == 0
