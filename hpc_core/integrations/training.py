"""One training that is being recorded: clock, memory, tokens, losses, and the record they become. Independent of the Trainer."""

from __future__ import annotations

import contextlib
import datetime
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from hpc_core.audit.own_step import Gradients
from hpc_core.case.case import Case
from hpc_core.instruments.allocations import StorageWatch
from hpc_core.instruments.growth import CALLS, GrowthWatch
from hpc_core.instruments.memory import host_peak_bytes, memory_metrics, model_metrics
from hpc_core.instruments.owners import gradient_tensors, optimizer_tensors, owned_bytes, weight_tensors
from hpc_core.instruments.timeline import Timeline
from hpc_core.record.environment import circumstances, gpu_state
from hpc_core.record.findings import Findings, mismatches
from hpc_core.record.metrics import metric
from hpc_core.record.record import Circumstances, Fact, Failure, Metric, Record

_MOST_SAMPLES = 1000
_WATCHED_STEP = 2
"""The step, counted from 0, whose tensors are watched on a CPU. By then the optimizer has its state."""
_AUDITED_STEPS = 4
"""The first steps, whose gradients are read. LoRA's A has none in the first one, while B is zero."""
Pause = Literal["evaluation", "save"]
_COMPARED_NUMBERS = 16
"""Leading numbers of each trainable tensor that are compared before and after the training."""


class StepClock:
    """Seconds of training steps by the host's clock.

    A step lasts from the end of the step before it to its own end, so loading data is part of it. Pauses are left out.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.samples: list[float] = []
        """Seconds of each step that was kept, in order."""
        self.first_step_s: float | None = None
        """Seconds from the creation of this clock to the end of the first step."""
        self.left_out_s = 0.0
        """Seconds of pauses between steps: evaluation, saving, logging."""
        self._now = now
        self._created = now()
        self._since: float | None = None

    def resume(self) -> float:
        """End a pause, and return its seconds: the time since the last step's end is left out, and the next step begins now."""
        now = self._now()
        left_out = 0.0 if self._since is None else now - self._since
        self.left_out_s += left_out
        self._since = now
        return left_out

    def step_begins(self) -> None:
        """Begin the first step. Later steps began when the one before them ended."""
        if self._since is None:
            self._since = self._now()

    def step_ended(self, *, keep: bool = True) -> None:
        """End a step. With `keep` its seconds become a sample."""
        now = self._now()
        if self.first_step_s is None:
            self.first_step_s = now - self._created
        if keep and self._since is not None:
            self.samples.append(now - self._since)
        self._since = now


def thinned(samples: Sequence[float], most: int) -> tuple[float, ...]:
    """Return at most `most` of the samples, evenly spread and in order.

    Raises:
        ValueError: `most` is below 1.
    """
    if most < 1:
        raise ValueError(f"At least one sample must be kept, not {most}.")
    if len(samples) <= most:
        return tuple(samples)
    return tuple(samples[index * len(samples) // most] for index in range(most))


class TrainedTokens:
    """Counts the tokens that enter a model in training, by a hook before its forward. Never waits for the device while training runs."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.positions = 0
        """Tokens of all training forwards, padding included."""
        self.uncounted = 0
        """Training forwards whose input was not understood. If there is one, `unpadded` is meaningless."""
        self._without_mask = 0
        self._masked: torch.Tensor | None = None
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def stop(self) -> None:
        """Remove the hook. May be called again."""
        self._handle.remove()

    def unpadded(self) -> int:
        """Return the tokens without padding. Waits for the device."""
        return self._without_mask + (0 if self._masked is None else int(self._masked.item()))

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return  # an evaluation
        ids = named.get("input_ids", args[0] if args else None)
        mask = named.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or (mask is not None and getattr(mask, "shape", None) != ids.shape):
            self.uncounted += 1
            return
        self.positions += ids.numel()
        if mask is None:
            self._without_mask += ids.numel()
            return
        with torch.no_grad():  # summed on the device
            kept = torch.count_nonzero(mask)
            self._masked = kept if self._masked is None else self._masked.add_(kept)


class Training:
    """Everything observed of one training, from its first step to its record."""

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
        self._numbers_before = _leading_numbers(model)
        self._gradient_bytes: int | None = None
        self._peak_bytes = 0
        self._watch: StorageWatch | None = None
        self._watched: dict[str, Metric] = {}
        self._pauses: dict[Pause, list[float]] = {}
        """Seconds of each evaluation and each saving, except those whose tensors were watched."""
        self._pause_peaks: dict[Pause, int] = {}
        self.pausing = False
        """Whether an evaluation or the saving of a checkpoint is going on."""
        self._gradients = Gradients()
        self._growth = GrowthWatch(device)

    def count_tokens(self) -> None:
        """Count the tokens that enter the model from now on."""
        self.tokens = TrainedTokens(self._model)

    def reset_peak(self) -> None:
        """Forget the memory that was used since the last step, such as an evaluation's."""
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)

    def step_begins(self, *, watch: bool) -> None:
        """Begin a step. With `watch`, one step's tensors are watched on a CPU; the caller must call `leave` if that step raises."""
        self.pausing = False
        self._end_watch()  # of a checkpoint that was not saved after all
        self.clock.step_begins()
        if watch and not self._on_gpu and self.steps == _WATCHED_STEP:
            self._begin_watch("step")

    def _begin_watch(self, *phases: str) -> None:
        self._watch = StorageWatch(phases)
        for category, tensors in weight_tensors(self._model).items():
            self._watch.own(category, tensors)
        self._watch.own("optimizer", optimizer_tensors(self._optimizer))
        self._watch(phases[0])
        self._watch.__enter__()

    def _end_watch(self) -> Timeline | None:
        watch, self._watch = self._watch, None
        if watch is None:
            return None
        watch.__exit__(None, None, None)
        return watch.timeline

    def pause_begins(self, pause: Pause, *, watch: bool) -> None:
        """Begin an evaluation or the saving of a checkpoint. With `watch`, the first one's tensors are watched on a CPU."""
        self.pausing = True
        self.clock.resume()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats(self._device)
        elif watch and self._watch is None and pause not in self._pause_peaks:
            self._begin_watch(pause)

    def pause_ended(self, pause: Pause) -> None:
        """End an evaluation or the saving of a checkpoint."""
        self.pausing = False
        seconds = self.clock.resume()
        timeline = self._end_watch()
        if timeline is None:
            self._pauses.setdefault(pause, []).append(seconds)
        peak = timeline.peak()[1] if timeline is not None else 0
        if self._on_gpu:
            peak = torch.cuda.max_memory_allocated(self._device)
        if peak:
            self._pause_peaks[pause] = max(peak, self._pause_peaks.get(pause, 0))

    def gradients_ready(self, *, audit: bool) -> None:
        """Measure the gradients. Called between the backward pass and the optimizer's step. `audit`: every one must exist here."""
        if audit and self.steps < _AUDITED_STEPS:
            self._gradients.look(part for part in self._model.parameters() if part.requires_grad)
        if self._gradient_bytes is None or self._watch is not None:
            gradients = gradient_tensors(self._model)
            self._gradient_bytes = owned_bytes(gradients)
            if self._watch is not None:
                self._watch.own("gradients", gradients)

    def step_ended(self) -> None:
        """End a step: read the peak, which does not synchronize, and the clock. A watched step is slow and gives no sample."""
        timeline = self._end_watch()
        if timeline is not None:
            self._watched = memory_metrics(timeline.peaks_by_phase(["step"]), timeline, on_gpu=False)
        if self._on_gpu:
            self._peak_bytes = max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device))
        self.steps += 1
        self.clock.step_ended(keep=timeline is None)
        if _WATCHED_STEP < self.steps <= _WATCHED_STEP + 1 + CALLS:
            self._growth.look()
            self.clock.resume()

    def leave(self) -> None:
        """Remove every hook and watch from the process. May be called again."""
        with contextlib.suppress(Exception):
            self._end_watch()
        if self.tokens is not None:
            self.tokens.stop()

    def failed(self, failure: Failure) -> Record:
        """Return the record of a training that gave no numbers."""
        return Record(case=self.case, status="failed", failure=failure, circumstances=self._circumstances())

    def record(self, warm_up: int) -> Record:
        """Return the record of a finished training. The first `warm_up` steps are not samples of its time."""
        self.leave()
        metrics = self._bytes() | self._times(warm_up) | self._token_counts()
        facts = self._facts()
        grows = self._growth.reason() if self._growth.calls == CALLS else None
        reasons = (*mismatches(facts), *([] if grows is None else [f"{grows}."]))
        found = Findings(metrics=metrics, facts=facts, reasons=reasons, losses=tuple(self.losses))
        return found.record(self.case, self._circumstances())

    def _circumstances(self) -> Circumstances:
        kind: Literal["cpu", "cuda"] = "cuda" if self._on_gpu else "cpu"
        gpu = {"before": self._gpu_before, "after": gpu_state()} if self._on_gpu else {}
        return circumstances(kind, "inline", started_at=self._started, gpu=gpu, notes=tuple(self.notes))

    def _facts(self) -> dict[str, Fact]:
        """Return `weights_moved` after two steps (the first step of a warm-up has a rate of 0), `gradients` if there are any between the
        backward pass and the optimizer's step, and `losses_finite` if any loss was logged.
        """
        facts: dict[str, Fact] = {}
        now = dict(self._model.named_parameters())
        known = [name for name in self._numbers_before if name in now]  # a wrapper may rename them
        moved = [name for name in known if _moved(self._numbers_before[name], now[name])]
        if known and self.steps > 1:
            facts["weights_moved"] = Fact(asked=True, seen=bool(moved))
            self.notes.append(
                f"{len(moved)} of {len(known)} trainable tensors moved in their first {_COMPARED_NUMBERS} numbers"
            )
        if self._gradients.reached:
            facts["gradients"] = self._gradients.fact({id(part): name for name, part in now.items()})
        if self.losses:
            facts["losses_finite"] = Fact(asked=True, seen=all(map(math.isfinite, self.losses)))
        return facts

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
        for pause, peak in self._pause_peaks.items():
            metrics[f"peak_{pause}_bytes"] = metric(f"peak_{pause}_bytes", peak, on_gpu=self._on_gpu)
        return metrics | self._watched

    def _times(self, warm_up: int) -> dict[str, Metric]:
        metrics = {f"{pause}_s": metric(f"{pause}_s", samples=each) for pause, each in self._pauses.items()}
        if self.clock.first_step_s is not None:
            note = "from the training's start to the end of its first step"
            metrics["cold_start_s"] = metric("cold_start_s", self.clock.first_step_s, note=note)
        samples = self.clock.samples[warm_up:]
        if not samples:
            self.notes.append(f"{self.steps} steps are too few for a time: the first {warm_up} are warm-up")
            return metrics
        metrics["step_s"] = metric("step_s", samples=thinned(samples, _MOST_SAMPLES), gated=False)
        self.notes.append(
            f"step_s: {len(samples)} steps by the host's clock, from end to end, not synchronized; data loading is in it, "
            f"{self.clock.left_out_s:.2f} s of evaluation, saving and logging are not"
        )
        return metrics

    def _token_counts(self) -> dict[str, Metric]:
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


def _leading_numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the first numbers of every trainable tensor, copied."""
    with torch.no_grad():
        return {
            name: parameter.detach().flatten()[:_COMPARED_NUMBERS].clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.numel() and parameter.layout == torch.strided
        }


def _moved(before: torch.Tensor, parameter: torch.nn.Parameter) -> bool:
    after = parameter.detach().flatten()[:_COMPARED_NUMBERS].to(before.device)
    return after.shape == before.shape and not torch.equal(after, before)
