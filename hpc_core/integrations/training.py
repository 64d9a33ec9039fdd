"""One training that is being watched: clock, memory, tokens, losses, and the record they become. Knows no event of the Trainer."""

from __future__ import annotations

import contextlib
import datetime
import statistics
from typing import Any, Literal

import torch

from hpc_core.audit.facts import verdict
from hpc_core.case.case import Case
from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.memory import host_peak_bytes, memory_metrics, model_metrics
from hpc_core.instruments.owners import (
    gradient_tensors,
    optimizer_tensors,
    owned_bytes,
    weight_tensors,
)
from hpc_core.integrations.learning import Learning
from hpc_core.integrations.step_clock import StepClock, thinned
from hpc_core.integrations.trained_tokens import TrainedTokens
from hpc_core.record.environment import circumstances, gpu_state
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import Failure, Metric, Record

_MOST_SAMPLES = 1000
_WATCHED_STEP = 2
"""On a CPU, the step (from 0) whose tensors are watched: the optimizer has its state by then."""


class Training:
    """What is seen of one training, from its first step to its record."""

    def __init__(self, case: Case, model: torch.nn.Module, optimizer: Any, device: torch.device, notes: list[str]):
        self.case = case
        self.clock = StepClock()
        self.losses: list[float] = []
        self.notes = notes
        self.steps = 0
        self.tokens: TrainedTokens | None = None
        self._model, self._optimizer, self._device = model, optimizer, device
        self._started = datetime.datetime.now(datetime.UTC)
        self._on_gpu = device.type == "cuda"
        self._gpu_before = gpu_state() if self._on_gpu else {}
        self._learning = Learning(model)
        self._gradient_bytes: int | None = None
        self._peak_bytes = 0
        self._watch: StorageWatch | None = None
        self._watched: dict[str, Metric] = {}

    def count_tokens(self) -> None:
        """Count what enters the model from now on."""
        self.tokens = TrainedTokens(self._model)

    def forget_peak(self) -> None:
        """What has used memory since the last step's end was no training."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def step_begins(self, *, watch: bool) -> None:
        """With `watch`, the tensors of one step on a CPU are watched; who asks must call `leave` if that step raises."""
        self.clock.step_begins()
        if watch and not self._on_gpu and self.steps == _WATCHED_STEP:
            self._watch = StorageWatch(["step"])
            for category, tensors in weight_tensors(self._model).items():
                self._watch.own(category, tensors)
            self._watch.own("optimizer", optimizer_tensors(self._optimizer))
            self._watch("step")
            self._watch.__enter__()

    def gradients_are_there(self) -> None:
        """Between backward and optimizer."""
        if self._gradient_bytes is None or self._watch is not None:
            gradients = gradient_tensors(self._model)
            self._gradient_bytes = owned_bytes(gradients)
            if self._watch is not None:
                self._watch.own("gradients", gradients)

    def step_ended(self) -> None:
        """Read the peak, which waits for nothing, and the clock. The seconds of a watched step are no sample."""
        was_watched = self._watch is not None
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            timeline = self._watch.timeline
            self._watched = memory_metrics(timeline.peaks_by_phase(["step"]), timeline, on_gpu=False)
            self._watch = None
        if self._on_gpu:
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device))
        self.steps += 1
        self.clock.step_ended(keep=not was_watched)

    def leave(self) -> None:
        """Leave nothing in the process: no watch, no hook. May be called again."""
        if self._watch is not None:
            with contextlib.suppress(Exception):
                self._watch.__exit__(None, None, None)
            self._watch = None
        if self.tokens is not None:
            self.tokens.stop()

    def failed(self, failure: Failure) -> Record:
        """The record of a training that gave no numbers."""
        return Record(case=self.case, status="failed", failure=failure, circumstances=self._circumstances())

    def record(self, warm_up: int) -> Record:
        """The record of a training that ended; the first `warm_up` steps are no samples of its time."""
        self.leave()
        metrics = self._bytes() | self._times(warm_up) | self._tokens()
        facts = self._learning.facts(self._model, self.losses, self.steps, self.notes)
        found = Findings(metrics=metrics, facts=facts, reasons=verdict(facts), losses=tuple(self.losses))
        return found.record(self.case, self._circumstances())

    def _circumstances(self) -> Any:
        kind: Literal["cpu", "cuda"] = "cuda" if self._on_gpu else "cpu"
        gpu = {"before": self._gpu_before, "after": gpu_state()} if self._on_gpu else {}
        return circumstances(kind, "inline", started_at=self._started, gpu=gpu, notes=tuple(self.notes))

    def _bytes(self) -> dict[str, Metric]:
        trainable = sum(part.numel() for part in self._model.parameters() if part.requires_grad)
        metrics = model_metrics(self._model) | {
            "optimizer_bytes": metric("optimizer_bytes", owned_bytes(optimizer_tensors(self._optimizer))),
            "trainable_parameters": metric("trainable_parameters", trainable),
            "host_peak_bytes": metric("host_peak_bytes", host_peak_bytes()),
        }
        if self._gradient_bytes is not None:
            metrics["gradient_bytes"] = metric("gradient_bytes", self._gradient_bytes)
        if self._on_gpu:
            metrics["peak_bytes"] = metric("peak_bytes", self._peak_bytes, on_gpu=True)
            reserved = int(torch.cuda.memory_stats(self._device)["reserved_bytes.all.peak"])
            metrics["reserved_bytes"] = metric("reserved_bytes", reserved)
        return metrics | self._watched

    def _times(self, warm_up: int) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {}
        if self.clock.first_step_s is not None:
            note = "from the training's begin to its first finished step"
            metrics["cold_start_s"] = metric("cold_start_s", self.clock.first_step_s, note=note)
        samples = self.clock.samples[warm_up:]
        if not samples:
            self.notes.append(f"{self.steps} steps are too few for a time: {warm_up} warm up")
            return metrics
        metrics["step_s"] = metric("step_s", samples=thinned(samples, _MOST_SAMPLES))
        self.notes.append(
            f"step_s: {len(samples)} steps by the host's clock, from end to end, not synchronized; data loading is in it, "
            f"{self.clock.left_out_s:.2f} s of evaluation, saving and logging are not"
        )
        return metrics

    def _tokens(self) -> dict[str, Metric]:
        if self.tokens is None or not self.tokens.positions or self.tokens.uncounted:
            if self.tokens is not None and self.tokens.uncounted:
                self.notes.append(f"tokens were not counted: {self.tokens.uncounted} batches had no plain ids and mask")
            return {}
        unpadded = self.tokens.unpadded()
        padded = self.tokens.positions - unpadded
        metrics = {
            "tokens": metric("tokens", unpadded),
            "padded_tokens": metric("padded_tokens", padded, better="lower"),  # the user's choice, not the case's
        }
        samples = self.clock.samples
        if samples:
            rate = unpadded / self.steps / statistics.fmean(samples)
            metrics["tokens_per_s"] = metric("tokens_per_s", rate, note="unpadded; the mean of all steps")
        return metrics
