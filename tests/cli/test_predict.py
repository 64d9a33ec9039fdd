"""`hpc-core predict` and `hpc_core.predicted`: whether a case fits a GPU that is not here."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hpc_core
from hpc_core.case.case import Case
from hpc_core.case.errors import PredictError, SpecError
from hpc_core.case.parts import ModelSpec
from hpc_core.case.shapes import SHAPES
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import catalogue
from hpc_core.cli import main
from hpc_core.cli import predict as command
from hpc_core.cli.inputs import case_of_model, context_length, parse_bytes, parse_changes, parse_sweep, with_changes
from hpc_core.record.gpus import gpu_named, with_memory
from hpc_core.record.record import Failure, Machine, Record, record_from_json
from hpc_core.report.predictions import prediction_block, sweep_table
from tests.commands import exit_code
from tests.strategies import a_case, a_record, around, counted, peak

GIB = 2**30
COMPILER = (sysconfig.get_config_var("CXX") or "c++").split()[0]
predicts = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="prediction compiles a small C++ file once")


def predicted_record(case: Case, gpu: str, peak_bytes: int, memory_bytes: int | None = None) -> Record:
    """Return a predicted record with this peak."""
    card = with_memory(gpu_named(gpu), memory_bytes)
    metrics = {"peak_bytes": peak(peak_bytes), "peak_backward_bytes": peak(peak_bytes), "peak_load_bytes": peak(GIB)}
    metrics |= {"at_peak_weights_bytes": peak(GIB), "weights_bytes": peak(GIB)}
    metrics |= {"flops": counted(10**12, unit="FLOP"), "kernels": counted(50, unit="1 per 10 steps")}
    where = Machine(key="predicted", name=card.name, memory_bytes=card.memory_bytes)
    return a_record(metrics, case=case, circumstances=around(where, gpu={"torch": "a CPU build"}))


def tiny_config() -> dict[str, Any]:
    """The configuration of the shape `tiny`, as a model's folder would hold it."""
    parsed = msgspec.to_builtins(SHAPES["tiny"])
    names: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    names += ("head_dim", "vocab_size", "tie_word_embeddings", "max_position_embeddings", "rms_norm_eps", "rope_theta")
    return {"model_type": parsed["architecture"]} | {name: parsed[name] for name in names}


@pytest.fixture
def a_gib_a_row(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    """Predict 2 GiB and one per row of the batch without workers, and return the cases that are predicted."""
    predicted_cases: list[Case] = []

    def prediction(_: Any, case: Case, *, gpu: str, memory_bytes: int | None = None, **_options: bool) -> Record:
        predicted_cases.append(case)
        assert isinstance(case.workload, FinetuneSpec)
        return predicted_record(case, gpu, (2 + case.workload.batch) * GIB, memory_bytes)

    monkeypatch.setattr(command, "prediction", prediction)
    return predicted_cases


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tiny/lroa"], "Near: tiny/lora"),
        (
            ["tiny/lora", "--gpu", "RTX"],
            "'RTX' matches RTX 3090 and RTX 4090 and RTX 5090. Known GPUs: H100 80GB HBM3,",
        ),
        (["tiny/lora", "--gpu", "Voodoo"], "No GPU is called 'Voodoo'"),
        (["tiny/lora", "--set", "batc=8"], "has no field 'batc' to vary. It has: ahead, alpha, attention, batch,"),
        (["tiny/lora", "--set", "batch"], "write --set batch=8"),
        (["tiny/lora", "--set", "batch=x"], "batch='x'"),
        (["tiny/lora", "--set", "batch=1", "--set", "batch=2"], "--set batch is given twice"),
        (["tiny/lora", "--set", "dtype=float16"], "use one of model_dtype, adapter_dtype"),
        (["tiny/lora", "--sweep", "batch"], "--sweep 'batch' names no field"),
        (["tiny/lora", "--sweep", "batch="], "no value. Write several"),
        (["tiny/lora", "--sweep", "batch=1,0"], "batch must be at least 1, got 0"),
        (["tiny/lora", "--sweep", "batch=1", "--fit", "batch"], "--sweep and --fit cannot be combined"),
        (["tiny/lora", "--fit", "dropout"], "that can be fitted: batch, length"),
        (["tiny/lora-padded", "--fit", "length"], "have their own lengths"),
        (["tiny/generate-bf16", "--fit", "rank"], "that can be fitted: batch, prompt_length, new_tokens"),
        (["tiny/lora", "--margin", "much"], "--margin 'much' is not a size"),
        (["tiny/lora", "--plot", "m.txt"], "the suffix says what to draw; it is one of .svg, .png, .pdf"),
        (["tiny/lora", "--plot", "m.svg", "--fit", "batch"], "--plot draws one prediction"),
        (["tiny/lora", "--over", "m.json"], "add --plot memory.svg"),
        (["tiny/lora", "--plot", "m.svg", "--over", "nowhere.json"], "nowhere.json: No such file"),
        ([], "Give either a case"),
        (["tiny/lora", "--model", "x"], "Give either a case"),
        (["tiny/lora", "--method", "full"], "--method needs --model"),
        (["--model", "./nowhere"], "no such folder or file, and not a hub id"),
        (["--model", "/"], "the folder has no config.json"),
        (["tiny/lora", "--batch", "2", "--set", "batch=3"], "batch is given twice"),
        (["tiny/lora", "--margin", "90GiB"], "leaves nothing of H100 80GB HBM3's 79.65 GiB"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bad input gives exit code 2 and one line that names it and the remedy, and nothing is predicted."""
    assert exit_code(main, "predict", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert err.count("\n") == 1


def test_values_are_json_or_text() -> None:
    """Numbers, lists and null are parsed as JSON; anything else is text."""
    parsed = parse_changes(
        ["batch=8", 'targets=["q_proj"]', "quantization=null", "model_dtype=float16", "prepare=true"]
    )
    assert parsed == {
        "batch": 8,
        "targets": ["q_proj"],
        "quantization": None,
        "model_dtype": "float16",
        "prepare": True,
    }
    assert parse_sweep("batch=1, 2,4") == ("batch", [1, 2, 4])
    assert parse_sweep("optimizer=adamw-fused,adamw-8bit") == ("optimizer", ["adamw-fused", "adamw-8bit"])
    assert parse_sweep('targets=[["q_proj"],["v_proj"]]') == ("targets", [["q_proj"], ["v_proj"]])


def test_the_id_of_a_changed_case_names_the_changes() -> None:
    """A changed case has its own id; setting a field to its present value changes nothing."""
    case = a_case()
    assert with_changes(case, {"batch": 8, "model_dtype": "float16"}).id == "tiny/lora+batch-8+model_dtype-float16"
    assert with_changes(case, {"batch": 4}) == case
    assert with_changes(case, {"targets": ["q_proj", "v_proj"]}).id == "tiny/lora+targets-q_proj-v_proj"


@pytest.mark.parametrize(
    ("text", "size"), [("1GiB", GIB), ("1.5 GiB", 3 * GIB // 2), ("512mib", 2**29), ("0", 0), ("2GB", 2 * 10**9)]
)
def test_sizes_with_units(text: str, size: int) -> None:
    """A size has a unit of powers of 1024 or 1000, with or without a space."""
    assert parse_bytes("--margin", text) == size


def test_an_unknown_unit_is_refused() -> None:
    """A size with an unknown unit is refused."""
    with pytest.raises(SpecError, match="not a size"):
        parse_bytes("--margin", "1 furlong")


def test_fit_finds_the_largest_within_the_margin(a_gib_a_row: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    """Of 24 GiB with a margin of 1 and 2 fixed, 21 rows fit. The output shows the margin and its reason."""
    assert exit_code(main, "predict", "tiny/lora", "--fit", "batch", "--gpu", "4090") == 0
    out, err = capsys.readouterr()
    assert "largest batch that fits: 21 (batch=22 would take 24.00 GiB" in out
    assert "kept free: 1.00 GiB of 24.00 GiB for the CUDA context (about 0.5 GiB)" in out
    assert "23.00 GiB of 24.00 GiB; 0 B left beyond the margin of 1.00 GiB" in out
    assert len(err.splitlines()) == len(a_gib_a_row) <= 6


def test_fit_says_when_nothing_fits(a_gib_a_row: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    """If not even the least value fits, the error has the numbers."""
    assert exit_code(main, "predict", "tiny/lora", "--fit", "batch", "--gpu", "4090", "--margin", "22GiB") == 2
    assert (
        "does not fit one RTX 4090 with any batch: batch=1 takes 3.00 GiB, and 2.00 GiB are left"
        in capsys.readouterr().err
    )
    assert a_gib_a_row


def test_sweep_prints_a_row_per_value(a_gib_a_row: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    """Each value of a sweep has a row, and one that does not fit shows by how much."""
    assert exit_code(main, "predict", "tiny/lora", "--sweep", "batch=1,2,40", "--gpu", "4090") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["batch", "peak"]
    assert [line.split()[0] for line in lines[2:5]] == ["1", "2", "40"]
    assert "NO: 19.00 GiB too much" in lines[4]
    assert [case.id for case in a_gib_a_row] == ["tiny/lora+batch-1", "tiny/lora", "tiny/lora+batch-40"]


def test_a_failed_row_of_a_sweep_says_why() -> None:
    """The table keeps its row, and a line below has the reason."""
    case = a_case()
    good = predicted_record(case, "4090", 3 * GIB)
    failure = Failure(kind="refused", message="No model of it.", phase="build")
    bad = Record(case=case, status="failed", failure=failure, circumstances=good.circumstances)
    table = sweep_table("batch", [("1", good), ("2", bad)], GIB).splitlines()
    assert table[2].split() == ["2", "-", "-", "-", "-", "-"]
    assert table[-1] == "batch=2: No model of it."


@predicts
@pytest.mark.slow
def test_a_length_beyond_the_host_or_the_model_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Beyond the host's memory a row has no prediction; beyond the model's context it has one, with a note."""
    assert exit_code(main, "predict", "tiny/lora", "--sweep", "length=2049,99999999") == 11
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2] == (
        "length=2049: note: rows of 2,049 tokens are longer than the model's context of 2,048 (max_position_embeddings)"
    )
    assert lines[-1].startswith("length=99999999: 10 random rows of 99,999,999 tokens need about ")


def test_the_first_line_says_whether_it_fits() -> None:
    """The first line says whether it fits; the last one shows a failed audit."""
    record = predicted_record(a_case(), "4090", 30 * GIB)
    lines = prediction_block(record, GIB).splitlines()
    assert lines[1].split("  ")[1].strip() == "DOES NOT FIT"
    assert "7.00 GiB too much with the margin of 1.00 GiB" in lines[1]
    invalid = msgspec.structs.replace(record, status="invalid", reasons=("quantized: asked for 1, saw 0.",))
    assert prediction_block(invalid, GIB).splitlines()[-1].endswith("INVALID: quantized: asked for 1, saw 0.")


@predicts
@pytest.mark.nightly
def test_python_and_the_command_agree_on_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with only a config.json is predicted by the command exactly as its shape is by `hpc_core.predicted`."""
    (tmp_path / "My Model").mkdir()
    (tmp_path / "My Model" / "config.json").write_text(json.dumps(tiny_config()))
    options = ["--gpu=RTX 4090", "--batch=2", "--length=64", "--set=steps=5", "--json", "--timeline"]
    assert exit_code(main, "predict", "--model", tmp_path / "My Model", "--method", "lora", *options) == 0
    printed = capsys.readouterr().out
    own = record_from_json(printed)
    assert own.case.id == "my-model/lora+batch-2+length-64+steps-5"
    assert own.case.model == ModelSpec(weights="config", path=str(tmp_path / "My Model"))

    record = hpc_core.predicted(catalogue()["tiny/lora"], gpu="RTX 4090")
    assert own.metrics == record.metrics
    assert json.loads(printed)["metrics"]["peak_bytes"]["value"] == record.metrics["peak_bytes"].value > 10 * 2**20
    assert record.circumstances.machine.name == "RTX 4090"
    assert record.timeline is None
    assert own.timeline is not None
    assert own.timeline.phases == ("forward", "backward", "optimizer")
    assert max(own.timeline.totals) == record.metrics["peak_requested_bytes"].value


@predicts
@pytest.mark.slow
def test_what_cannot_be_predicted_is_refused_by_name() -> None:
    """For a static cache Python raises the message with which the worker refuses it."""
    with pytest.raises(PredictError, match="static cache"):
        hpc_core.predicted(catalogue()["tiny/generate-bf16"].vary("static", cache="static"))


def test_a_failed_prediction_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed prediction prints its reason without a traceback and exits with 2."""
    failure = Failure(kind="refused", message="No model of it.", phase="build")
    monkeypatch.setattr(
        command,
        "prediction",
        lambda _, case, **__: Record(
            case=case, status="failed", failure=failure, circumstances=a_record().circumstances
        ),
    )
    assert exit_code(main, "predict", "tiny/lora") == 2
    assert capsys.readouterr() == ("", "hpc-core: tiny/lora: No model of it.\n")


def test_the_case_of_a_model(tmp_path: Path) -> None:
    """A hub id need not be downloaded; the context length of a local configuration bounds --fit length."""
    hub = case_of_model("some-owner/Some-Model-8B", "qlora")
    assert (hub.id, hub.quantization is not None) == ("some-model-8b/qlora", True)
    assert hub.model == ModelSpec(weights="config", path="some-owner/Some-Model-8B")
    assert context_length(hub.model) is None
    file = tmp_path / "config.json"
    file.write_text(json.dumps(tiny_config()))
    local = case_of_model(str(file), "generate")
    assert local.kind == "generate"
    assert local.model is not None
    assert context_length(local.model) == 2048


def test_a_wrong_gpu_in_python_starts_no_process() -> None:
    """An ambiguous name is refused at once, with the names that match."""
    with pytest.raises(PredictError, match="RTX 5090"):
        hpc_core.predicted(a_case(), gpu="RTX")


def test_memory_names_a_card_that_the_table_lacks(a_gib_a_row: list[Case], capsys: pytest.CaptureFixture[str]) -> None:
    """`--memory` is the card's own size, for one prediction and for the largest batch; the rules are those of `--gpu`."""
    assert exit_code(main, "predict", "tiny/lora", "--gpu", "4090", "--memory", "6GiB") == 0
    assert "on one RTX 4090 with 6.00 GiB, predicted\n  fits" in capsys.readouterr().out
    assert exit_code(main, "predict", "tiny/lora", "--gpu", "4090", "--memory", "4GiB") == 1
    assert exit_code(main, "predict", "tiny/lora", "--memory", "10GiB", "--fit", "batch") == 0
    assert "largest batch that fits: 7 " in capsys.readouterr().out


def test_a_row_of_the_table_is_a_model() -> None:
    """Its name is enough: attention and targets are the row's."""
    case = case_of_model("gemma-2-9b", "lora")
    assert (case.id, case.model) == ("gemma-2-9b/lora", ModelSpec(shape="gemma-2-9b", attention="eager"))
    assert case.adapter is not None
    found = case_of_model("phi-4", "qlora").adapter
    assert found is not None
    assert found.targets == ("qkv_proj", "o_proj")
    assert case_of_model("mixtral-8x7b", "generate").id == "mixtral-8x7b/generate"
