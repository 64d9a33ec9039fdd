"""A real Trainer on a tiny model with the callback: what is recorded, what stays unchanged, and how failures are reported."""

from __future__ import annotations

import contextlib
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hpc_core.baselines.accept import accept
from hpc_core.baselines.lookup import find
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Verdict
from hpc_core.integrations.trainer import PerfCallback
from hpc_core.integrations.training import Training
from hpc_core.record.record import Record, record_from_json

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, BATCH, ACCUMULATED, LENGTH = 12, 2, 2, 16
_PAUSES = {"eval_strategy": "steps", "eval_steps": 5, "save_strategy": "steps", "save_steps": 6}


class _Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows with no padding, one, two and three padding tokens in turn."""

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(LENGTH) + index
        mask = torch.ones(LENGTH, dtype=torch.long)
        mask[LENGTH - index % 4 :] = 0
        return {"input_ids": ids, "labels": ids, "attention_mask": mask}


class _Wasteful(_Rows):
    """Rows that are half padding."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        row["attention_mask"][LENGTH // 2 :] = 0
        return row


class _Leaks(transformers.TrainerCallback):  # type: ignore[misc]
    """Keeps 64 KiB of every step."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        self.tensors.append(torch.zeros(2**14))


class _Holds(_Leaks):
    """Keeps 64 KiB of the step whose tensors are watched."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if state.global_step == 2:
            super().on_step_begin(args, state, control, **known)


class _Fails(_Rows):
    """Rows whose labels are shorter than their ids."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        return row | {"labels": row["labels"][:3]}


def _trainer(folder: Path, *callbacks: Any, rows: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 256}
    config = transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **sizes)
    chosen = {
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATED,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "learning_rate": 1e-2,
    }
    arguments = transformers.TrainingArguments(str(folder), use_cpu=True, report_to=[], **(chosen | settings))
    return transformers.Trainer(
        transformers.LlamaForCausalLM(config),
        arguments,
        train_dataset=rows or _Rows(),
        eval_dataset=_Rows(),
        callbacks=list(callbacks),
    )


def _read(path: Path) -> Record:
    return record_from_json(path.read_bytes())


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Record, list[float], Any]:
    """The record of a training with evaluations and checkpoints, its logged losses, and the trainer."""
    folder = tmp_path_factory.mktemp("watched")
    with PerfCallback(folder / "run.json", case="trainer/tiny", limits=Limits(peak_bytes=2**30)) as perf:
        trainer = _trainer(folder, perf, **_PAUSES)
        trainer.train()
    return _read(folder / "run.json"), _losses(trainer), trainer


def _losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_training_becomes_a_record(recorded: tuple[Record, list[float], Any]) -> None:
    """The record has the tokens of the rows, the bytes of the live tensors, and the logged losses."""
    record, losses, trainer = recorded
    assert (record.status, record.reasons) == ("ok", ())
    values = {name: metric.value for name, metric in record.metrics.items()}
    positions = STEPS * ACCUMULATED * BATCH * LENGTH
    assert values["padded_tokens"] == STEPS * ACCUMULATED * BATCH * 1.5  # each row once, with 0 to 3 of them
    assert values["tokens"] == positions - values["padded_tokens"]
    parameters = sum(part.numel() for part in trainer.model.parameters())
    assert values["trainable_parameters"] == parameters
    assert values["gradient_bytes"] == 4 * parameters
    tensors = len(list(trainer.model.parameters()))
    assert values["optimizer_bytes"] == 8 * parameters + 4 * tensors  # two moments, and a count of steps a tensor
    assert values["peak_bytes"] > values["weights_bytes"] + values["gradient_bytes"] + values["optimizer_bytes"]
    assert list(record.losses) == losses
    assert all(fact.holds for fact in record.audit.values())
    assert {"weights_moved", "losses_finite", "gradients"} == set(record.audit)


def test_only_exact_metrics_are_gated(recorded: tuple[Record, list[float], Any]) -> None:
    """Peak and padding are gated and wall times are not; warm-up and the watched step give no time sample."""
    metrics = recorded[0].metrics
    assert {"peak_bytes", "padded_tokens"} <= {name for name, metric in metrics.items() if metric.gated}
    assert not [name for name, metric in metrics.items() if metric.gated and metric.noise == "wall"]
    assert len(metrics["step_s"].samples or ()) == STEPS - 2 - 1
    assert "evaluation, saving and logging are not" in " ".join(recorded[0].circumstances.notes)


def test_the_same_training_passes_and_a_worse_one_does_not(
    recorded: tuple[Record, list[float], Any], tmp_path: Path
) -> None:
    """A second run equals the baseline exactly; more padding, and memory kept by every step, are regressions."""
    record, _, _ = recorded
    accept(tmp_path / "baselines", record, reason="first", allow_dirty=True)
    lookup = find(tmp_path / "baselines", "cpu", "trainer/tiny")
    perf = PerfCallback(tmp_path / "run.json", case="trainer/tiny", limits=Limits(peak_bytes=2**30))
    with perf:
        _trainer(tmp_path, perf, **_PAUSES).train()
    assert judge(_read(perf.path), lookup).verdict is Verdict.PASS
    with perf:
        _trainer(tmp_path, perf, _Holds(), rows=_Wasteful(), **_PAUSES).train()
    worse = {row.metric: row for row in judge(_read(perf.path), lookup).metrics}
    assert {name for name, row in worse.items() if row.verdict is Verdict.REGRESSED} >= {"peak_bytes", "padded_tokens"}
    assert worse["peak_bytes"].change == 2**16


def test_the_callback_does_not_change_the_training(recorded: tuple[Record, list[float], Any], tmp_path: Path) -> None:
    """Losses equal those without the callback bit for bit, and no hook stays on the model."""
    _, losses, trainer = recorded
    alone = _trainer(tmp_path)
    alone.train()
    assert _losses(alone) == losses
    assert not trainer.model._forward_pre_hooks


def test_a_training_that_raises_leaves_its_reason(tmp_path: Path) -> None:
    """The exception propagates, the failed record contains it, and no hook stays on the model."""
    perf = PerfCallback(tmp_path / "run.json")
    trainer = _trainer(tmp_path, perf, rows=_Fails())
    with pytest.raises(ValueError, match="batch_size"), perf:
        trainer.train()
    failure = _read(perf.path).failure
    assert failure is not None
    assert (failure.kind, failure.phase) == ("error", "train")
    assert failure.message.startswith("ValueError after 0 steps: Expected input batch_size")
    assert not trainer.model._forward_pre_hooks


class _Interrupts(transformers.TrainerCallback):  # type: ignore[misc]
    """Ctrl-C in the step whose tensors are watched."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("within", [True, False])
def test_an_interrupted_training_leaves_a_failed_record(tmp_path: Path, within: bool) -> None:
    """Ctrl-C in the middle of the watched step leaves a failed record and ends the watching of tensors."""
    perf = PerfCallback(tmp_path / "run.json")
    trainer = _trainer(tmp_path, perf, _Interrupts())
    with pytest.raises(KeyboardInterrupt), perf if within else contextlib.nullcontext():
        trainer.train()
    failure = _read(perf.path).failure
    assert failure is not None
    assert failure.kind == "interrupted"
    assert ("after 2 steps" in failure.message) is within
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_an_error_of_the_callback_does_not_end_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The training runs to its end, the log says that recording stopped, and the record is failed."""
    monkeypatch.setattr(Training, "step_ended", lambda self: 1 / 0)
    perf = PerfCallback(tmp_path / "run.json")
    trainer = _trainer(tmp_path, perf)
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert "stopped recording: ZeroDivisionError" in caplog.text
    failure = _read(perf.path).failure
    assert failure is not None
    assert "recording stopped after 0 steps" in failure.message


def test_a_training_that_teaches_nothing_is_invalid(tmp_path: Path) -> None:
    """With a learning rate of 0 no weight moves, so the record is INVALID."""
    perf = PerfCallback(tmp_path / "run.json")
    _trainer(tmp_path, perf, learning_rate=0.0, max_steps=3).train()
    record = _read(perf.path)
    assert record.status == "invalid"
    assert record.reasons == ("weights_moved: asked for True, saw False.",)
    assert "peak_bytes" not in record.metrics  # on a CPU a step is watched only where a failure would be seen


def test_memory_that_every_step_keeps_is_invalid(tmp_path: Path) -> None:
    """The first run says how much and what."""
    perf = PerfCallback(tmp_path / "run.json")
    _trainer(tmp_path, perf, _Leaks()).train()
    assert _read(perf.path).reasons == ("memory grows 64.00 KiB a step, held float32[16384].",)


def test_adapters_without_gradients_are_invalid(tmp_path: Path) -> None:
    """Reentrant checkpointing of frozen inputs gives them none, and the head moves all the same."""
    perf = PerfCallback(tmp_path / "run.json")
    reentrant = {"use_reentrant": True}
    trainer = _trainer(tmp_path, perf, gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant)
    trainer.model.get_input_embeddings().requires_grad_(False)
    trainer.model.enable_input_require_grads = lambda: None  # as before transformers called it
    trainer.train()
    (reason,) = _read(perf.path).reasons
    assert reason.startswith("gradients: asked for '20 of 20 reached', saw '2 of 20 reached; model.layers.0.")


def test_evaluating_and_saving_have_peaks_and_times(tmp_path: Path) -> None:
    """An evaluation that keeps all logits has a higher peak than one that keeps none; the steps' peak is the same."""
    between = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 8}

    def values(metrics: Any) -> dict[str, float]:
        with PerfCallback(tmp_path / "run.json") as perf:
            trainer = _trainer(tmp_path, perf, **between)
            trainer.compute_metrics = metrics
            trainer.train()
        return {name: metric.value for name, metric in _read(perf.path).metrics.items()}

    lean, keeping = values(None), values(lambda kept: {"rows": len(kept.predictions)})
    logits = 48 * LENGTH * 256 * 4
    assert keeping["peak_evaluation_bytes"] - lean["peak_evaluation_bytes"] > logits / 2
    assert keeping["peak_bytes"] == lean["peak_bytes"]
    assert lean["peak_save_bytes"] >= lean["weights_bytes"] + lean["optimizer_bytes"]
    assert {"evaluation_s", "save_s"} <= {*lean}


def test_bad_arguments_are_refused_before_the_training(tmp_path: Path) -> None:
    """A folder in place of a file, negative steps and a malformed id are refused before the training starts."""
    with pytest.raises(SpecError, match="this is a folder"):
        PerfCallback(tmp_path)
    with pytest.raises(SpecError, match="at least 0"):
        PerfCallback(tmp_path / "run.json", warm_up=-1)
    with pytest.raises(SpecError, match="<shape>/<variant>"):
        _trainer(tmp_path, PerfCallback(tmp_path / "run.json", case="No Id")).train()


def test_the_example_leaves_its_record(tmp_path: Path) -> None:
    """The training of examples/trainer leaves a sound record in which padding and the peak are gated."""
    torch.set_num_threads(1)
    main = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trainer" / "train.py"))["main"]
    record = _read(main(tmp_path))
    assert (record.status, record.reasons, len(record.losses)) == ("ok", (), 20)
    assert record.metrics["padded_tokens"].gated
    assert record.metrics["peak_bytes"].gated
    assert record.losses[-1] < record.losses[0]
