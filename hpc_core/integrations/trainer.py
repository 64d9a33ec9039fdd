"""`PerfCallback`: what transformers' Trainer tells while it trains, as a record like that of any case.

Hears events only; what is measured is `training`'s. Nothing that goes wrong in here ends a training.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from transformers import TrainerCallback

from hpc_core.case.errors import SpecError
from hpc_core.case.limits import Limits
from hpc_core.integrations.trainer_case import settings, trainer_case
from hpc_core.integrations.training import Training
from hpc_core.record.files import write_whole
from hpc_core.record.record import Failure, FailureKind, record_to_json

_LOG = logging.getLogger("hpc_core")
_PHASE = "train"


def _harmless(event: Callable[..., None]) -> Callable[..., None]:
    """An error in here is told once and ends the watching, not the training."""

    @functools.wraps(event)
    def heard(self: PerfCallback, *args: Any, **kwargs: Any) -> None:
        try:
            event(self, *args, **kwargs)
        except Exception as error:
            self._give_up(error)

    return heard


class PerfCallback(TrainerCallback):  # type: ignore[misc]  # transformers ships no types that mypy follows here
    """Records a training by `transformers.Trainer`, or by one of TRL's: `Trainer(…, callbacks=[PerfCallback("run.json", case="sft/llama")])`.

    A record is written when the training begins, as failed, and again when it ends: a training that raises, is killed or interrupted leaves
    the first. Used as `with PerfCallback(…) as perf:` around `trainer.train()`, the record of a failure says what was raised, and on a
    CPU the peak of one step's tensors is measured too.
    """

    def __init__(
        self, path: str | Path, *, case: str = "trainer/run", limits: Limits | None = None, warm_up: int = 2
    ) -> None:
        """Watch the next training.

        Args:
            path: the file of the record, written whole or not at all.
            case: the id under which it is compared, `<group>/<name>` in lower case.
            limits: as those of any case, for `hpc-core baseline diff`.
            warm_up: how many first steps are no samples of time.

        Raises:
            SpecError: the path is a folder, or a negative number of steps.
        """
        self.path = Path(path)
        if self.path.is_dir():
            raise SpecError(f"PerfCallback({str(path)!r}): this is a folder; name a file for the record.")
        if warm_up < 0:
            raise SpecError(f"PerfCallback(warm_up={warm_up}): must be at least 0.")
        self._case, self._limits, self._warm_up = case, limits or Limits(), warm_up
        self._within = False
        self._training: Training | None = None
        self._forgets = True

    def __enter__(self) -> Self:
        """From here on a failure is seen."""
        self._within = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write what was raised, which goes on its way."""
        self._within = False
        training, self._training = self._training, None
        if training is not None:
            training.leave()
            if error is not None:
                failure = Failure(kind=_kind(error), message=_said(error, training.steps), phase=_PHASE)
                _write(self.path, training, failure)

    def on_train_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """The training begins: what it is, and a record that says it has not ended.

        Raises:
            OSError: the record cannot be written there; said now, and not after hours.
            SpecError: the case's id is none.
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
        notes = [settings(args, model)]
        loader = known.get("train_dataloader")
        case = trainer_case(self._case, args, state, loader, cuda=cuda, limits=self._limits)
        training = Training(case, model, known["optimizer"], device, notes)
        self._forgets = bool(args.skip_memory_metrics)
        if not self._forgets:
            notes.append("skip_memory_metrics=False: the Trainer keeps the peak itself, so an evaluation's is in it")
        if args.world_size > 1:
            notes.append(f"of process 0 of {args.world_size}")
        if getattr(args, "torch_compile", False) or args.n_gpu > 1:
            notes.append("tokens are not counted where the model is compiled or copied to several GPUs")
        else:
            training.count_tokens()
        self._training = training
        _write(self.path, training, _not_ended())
        self._peak_begins()

    @_harmless
    def on_epoch_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """What ended the epoch before, such as its evaluation, was no step."""
        if self._training is not None and self._training.steps:
            self._training.clock.training_goes_on()

    @_harmless
    def on_step_begin(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """A step begins."""
        if self._training is not None:
            self._training.step_begins(watch=self._within)

    @_harmless
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """The gradients are there."""
        if self._training is not None:
            self._training.gradients_are_there()

    @_harmless
    def on_step_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """A step has ended."""
        if self._training is not None:
            self._training.step_ended()

    @_harmless
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **known: Any) -> None:
        """A loss is known: the Trainer has waited for it."""
        if self._training is not None:
            loss = (logs or {}).get("loss")
            if isinstance(loss, int | float):
                self._training.losses.append(float(loss))
            self._after_a_pause()

    @_harmless
    def on_evaluate(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """An evaluation has ended."""
        self._after_a_pause()

    @_harmless
    def on_save(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """A checkpoint was saved."""
        self._after_a_pause()

    @_harmless
    def on_train_end(self, args: Any, state: Any, control: Any, **known: Any) -> None:
        """The training has ended: its record."""
        training, self._training = self._training, None
        if training is None:
            return
        if args.logging_steps != 1:
            training.notes.append(f"losses are means, logged every {args.logging_steps:g} steps")
        try:
            record = training.record(self._warm_up)
            write_whole(self.path, record_to_json(record, indent=2) + b"\n")
        finally:
            training.leave()

    def _after_a_pause(self) -> None:
        if self._training is not None and self._training.steps:
            self._training.clock.training_goes_on()
            self._peak_begins()

    def _peak_begins(self) -> None:
        if self._training is not None and self._forgets:
            self._training.forget_peak()

    def _give_up(self, error: Exception) -> None:
        training, self._training = self._training, None
        _LOG.warning("PerfCallback stopped watching: %s: %s. The training goes on.", type(error).__name__, error)
        if training is not None:
            training.leave()
            message = f"watching stopped after {training.steps} steps: {type(error).__name__}: {error}"
            _write_or_tell(self.path, training, Failure(kind="error", message=message, phase=_PHASE))


def _write(path: Path, training: Training, failure: Failure) -> None:
    write_whole(path, record_to_json(training.failed(failure), indent=2) + b"\n")


def _write_or_tell(path: Path, training: Training, failure: Failure) -> None:
    try:
        _write(path, training, failure)
    except OSError as error:
        _LOG.warning("%s: the record cannot be written: %s", path, error)


def _not_ended() -> Failure:
    message = (
        "This training had not ended when it was last heard of. If it does not run any more, it raised or was killed."
    )
    return Failure(kind="interrupted", message=message, phase=_PHASE)


def _kind(error: BaseException) -> FailureKind:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out_of_memory"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "error"


def _said(error: BaseException, steps: int) -> str:
    return f"{type(error).__name__} after {steps} steps: {str(error).strip() or 'no message'}"
