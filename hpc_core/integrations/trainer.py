"""`PerfCallback`: turns a training by transformers' Trainer into a record like that of any case.

It handles the Trainer's events; `training` measures. An error of its own never ends the training.
"""

from __future__ import annotations

import enum
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import torch
from transformers import TrainerCallback

from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.case.workloads import CallableSpec
from hpc_core.integrations.training import Training
from hpc_core.record.exceptions import message_of
from hpc_core.record.files import write_record
from hpc_core.record.record import Failure, FailureKind

_LOG = logging.getLogger("hpc_core")
_PHASE = "train"
_FACTORY = "transformers:Trainer"
_REQUESTED = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed")
"""The settings that decide how much work a training does. They are part of the case, and so of its digest."""
_NOTED = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "max_grad_norm", "lr_scheduler_type", "warmup_steps"),
    *("bf16", "fp16", "tf32", "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_compile"),
    *("use_liger_kernel", "neftune_noise_alpha", "dataloader_num_workers", "train_sampling_strategy"),
    *("max_length", "packing", "packing_strategy", "padding_free", "completion_only_loss", "assistant_only_loss"),
)
"""Settings of TrainingArguments, and of TRL's, that only go into the notes. If one changes, by accident or by a new default of a
library, the record is still compared with its baseline and the regression is found."""


def _safe(event: Callable[..., None]) -> Callable[..., None]:
    """Log an error of this handler once and stop recording. The training goes on."""

    @functools.wraps(event)
    def handler(self: PerfCallback, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            self._stop_recording(error)

    return handler


class PerfCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that mypy follows here
    """Record a training by `transformers.Trainer` or by one of TRL's trainers.

    `Trainer(…, callbacks=[PerfCallback("run.json", case="sft/llama")])` writes a failed record when the training begins and replaces it
    when the training ends. A training that raises, is killed or is interrupted leaves the failed record. With
    `with PerfCallback(…) as perf:` around `trainer.train()`, that record contains the exception, and on a CPU the peak of one step's
    tensors is measured too.
    """

    def __init__(
        self, path: str | Path, *, case: str = "trainer/run", limits: Limits | None = None, warm_up: int = 2
    ) -> None:
        """Record the next training.

        Args:
            path: the record's file, written whole or not at all.
            case: the id under which the record is compared, `<group>/<name>` in lower case.
            limits: limits as in any case, for `hpc-core baseline diff`.
            warm_up: how many of the first steps give no sample of time.

        Raises:
            SpecError: the path is a folder, or `warm_up` is negative.
        """
        self.path = Path(path)
        if self.path.is_dir():
            raise SpecError(f"PerfCallback({str(path)!r}): this is a folder; name a file for the record.")
        if warm_up < 0:
            raise SpecError(f"PerfCallback(warm_up={warm_up}): must be at least 0.")
        self._case, self._limits, self._warm_up = case, limits or Limits(), warm_up
        self._within = False
        self._training: Training | None = None
        self._resets_peak = True

    def __enter__(self) -> Self:
        """Record exceptions from here on."""
        self._within = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the exception into the record. It propagates."""
        self._within = False
        training, self._training = self._training, None
        if training is not None:
            training.leave()
            if error is not None:
                failure = Failure(kind=_kind(error), message=_described(error, training.steps), phase=_PHASE)
                _write(self.path, training, failure)

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Start recording, and write a record that says that the training has not ended.

        Raises:
            OSError: the record cannot be written. Better now than after hours of training.
            SpecError: the case's id is malformed.
        """
        if self._training is not None:
            self._training.leave()
            self._training = None
        device = torch.device(args.device)
        if not state.is_world_process_zero or device.type not in ("cpu", "cuda"):
            if state.is_world_process_zero:
                _LOG.warning("PerfCallback records on CPUs and CUDA GPUs; this is %s: no record.", device.type)
            return
        model, cuda = known["model"], device.type == "cuda"
        notes = [_settings(args, model)]
        loader = known.get("train_dataloader")
        case = _case(self._case, args, state, loader, cuda=cuda, limits=self._limits)
        training = Training(case, model, known["optimizer"], device, notes)
        self._resets_peak = bool(args.skip_memory_metrics)
        if not self._resets_peak:
            notes.append("skip_memory_metrics=False: the Trainer resets the peak itself, so it includes evaluations")
        if args.world_size > 1:
            notes.append(f"process 0 of {args.world_size}")
        if getattr(args, "torch_compile", False) or args.n_gpu > 1:
            notes.append("tokens are not counted because the model is compiled or copied to several GPUs")
        else:
            training.count_tokens()
        self._training = training
        _write(self.path, training, _unfinished())
        self._reset_peak()

    @_safe
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Leave out what ended the epoch before, such as an evaluation."""
        if self._training is not None and self._training.steps:
            self._training.clock.resume()

    @_safe
    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Begin a step."""
        if self._training is not None:
            self._training.step_begins(watch=self._within)

    @_safe
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Measure the gradients."""
        if self._training is not None:
            self._training.gradients_ready(audit=args.world_size == 1)  # a process of several may hold only its part

    @_safe
    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """End a step."""
        if self._training is not None:
            self._training.step_ended()
            self._pause(control)

    @_safe
    def on_epoch_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Begin the evaluation or the checkpoint that an epoch ends with."""
        if self._training is not None and self._training.steps:
            self._pause(control)

    @_safe
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **known: Any) -> None:
        """Keep the loss. The Trainer has waited for it, so the pause is left out."""
        if self._training is not None:
            loss = (logs or {}).get("loss")
            if isinstance(loss, int | float):
                self._training.losses.append(float(loss))
            if not self._training.pausing:  # an evaluation logs too, before it ends
                self._resume()

    @_safe
    def on_evaluate(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Leave the evaluation out of the steps, and note its own peak and time."""
        if self._training is not None and self._training.steps:
            self._training.pause_ended("evaluation")
            if control.should_save:
                self._training.pause_begins("save", watch=self._within)
        self._resume()

    @_safe
    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Leave the saving of a checkpoint out of the steps, and note its own peak and time."""
        if self._training is not None and self._training.steps:
            self._training.pause_ended("save")
        self._resume()

    @_safe
    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """Write the record of the finished training."""
        training, self._training = self._training, None
        if training is None:
            return
        if args.logging_steps != 1:
            training.notes.append(f"losses are means, logged every {args.logging_steps:g} steps")
        try:
            record = training.record(self._warm_up)
            write_record(self.path, record)
        finally:
            training.leave()

    def _pause(self, control: Any) -> None:
        """Begin what the Trainer does after a step or an epoch: it evaluates first, then saves."""
        if self._training is not None and (control.should_evaluate or control.should_save):
            self._training.pause_begins("evaluation" if control.should_evaluate else "save", watch=self._within)

    def _resume(self) -> None:
        if self._training is not None and self._training.steps:
            self._training.clock.resume()
            self._reset_peak()

    def _reset_peak(self) -> None:
        if self._training is not None and self._resets_peak:
            self._training.reset_peak()

    def _stop_recording(self, error: Exception) -> None:
        training, self._training = self._training, None
        _LOG.warning(
            "PerfCallback stopped recording: %s: %s. The training goes on.", type(error).__name__, message_of(error)
        )
        if training is not None:
            training.leave()
            message = f"recording stopped after {training.steps} steps: {type(error).__name__}: {message_of(error)}"
            _write_or_log(self.path, training, Failure(kind="error", message=message, phase=_PHASE))


def _write(path: Path, training: Training, failure: Failure) -> None:
    write_record(path, training.failed(failure))


def _write_or_log(path: Path, training: Training, failure: Failure) -> None:
    try:
        _write(path, training, failure)
    except OSError as error:
        _LOG.warning("%s: the record cannot be written: %s", path, error)


def _unfinished() -> Failure:
    message = "This training has not ended. If it is not running any more, it raised an exception or was killed."
    return Failure(kind="interrupted", message=message, phase=_PHASE)


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out_of_memory"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "error"


def _described(error: BaseException, steps: int) -> str:
    return f"{type(error).__name__} after {steps} steps: {message_of(error)}"


def _case(case_id: str, args: Any, state: Any, loader: Any, *, cuda: bool, limits: Limits) -> Case:
    """Return the case of the training that begins now.

    Raises:
        SpecError: the id is malformed.
    """
    requested = {name: getattr(args, name) for name in _REQUESTED if getattr(args, name, None) is not None}
    return Case(
        id=case_id,
        scale="full" if cuda else "tiny",
        workload=CallableSpec(
            factory=_FACTORY,
            arguments=requested | {"processes": args.world_size} | _rows(loader),
            steps=max(int(state.max_steps), 1),
        ),
        limits=limits,
    )


def _rows(loader: Any) -> dict[str, int]:
    try:
        return {"rows": len(loader.dataset)}
    except (TypeError, AttributeError):  # a stream has no length
        return {}


def _settings(args: Any, model: torch.nn.Module) -> str:
    """Return the other settings in one line, for the record's notes."""
    parts = [type(model).__name__, type(args).__name__]
    for name in _NOTED:
        value = getattr(args, name, None)
        value = value.value if isinstance(value, enum.Enum) else value
        if value not in (None, False):
            parts.append(f"{name}={msgspec.json.encode(value, enc_hook=str).decode()}")
    return ", ".join(parts)
