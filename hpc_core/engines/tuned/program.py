"""The tuned training program: a `FinetuneProgram` whose step follows the switches of the case.

If a switch is not possible, the step runs without it and `fallen` gives the reason by the switch's name, which the audit
reports as a mismatch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from hpc_core.builders.assemble import Built
from hpc_core.builders.data.device_batches import DeviceBatch
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.capture import CapturedWork
from hpc_core.engines.finetune import FinetuneProgram, finetune_program
from hpc_core.engines.tuned.compile import compile_layers, settled
from hpc_core.engines.tuned.forward import TunedForward, tune
from hpc_core.engines.tuned.memory_budget import Plan, fit
from hpc_core.engines.tuned.optimizer import AdamWInBackward
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.instruments.program import Mark, unmarked

_WARM_STEPS = 4
"""Real steps before the capture.

The first compiles and creates the optimizer's state, the second shows the peak that is compared with the budget, the
third follows the corrected plan, and in the fourth nothing may compile.
"""
_PEAK_STEP = 2


class TunedProgram(FinetuneProgram):
    """Train with the workload's switches. Warm-up steps train too, so the losses are the stock program's, step by step."""

    workload: FinetuneSpec
    forward: TunedForward
    captured: CapturedWork | None = None
    plan: Plan | None = None
    miscounted_bytes = 0
    """The error of the plan's expected peak, known after a step on a GPU."""

    def prepare(self, workload: FinetuneSpec) -> None:
        """Install the tuned forward in the model.

        Raises:
            BuildError: the switches do not support the model, or the budget is too small.
        """
        self.workload = workload
        self.fallen: dict[str, str] = {}
        self._watched = False
        self._taken = 0
        self._static: DeviceBatch | None = None
        device = self.batches[0].ids.device
        on_gpu = device.type == "cuda"
        self.run = Pointwise(compiled=on_gpu and workload.fusion == "blocks")
        self.forward = tune(self.model, workload, self.run)
        if workload.compile == "layers":
            compile_layers(self.forward.decoder.layers)
        if workload.optimizer_in_backward:
            trained = [part for group in self.optimizer.param_groups for part in group["params"]]
            self.optimizer = AdamWInBackward(trained, lr=workload.learning_rate, run=self.run)
        if workload.budget_bytes is not None:
            self.plan = fit(self, workload.budget_bytes)
        self._stream: torch.cuda.Stream | None = None
        if workload.graph and on_gpu:
            self._stream = torch.cuda.Stream(device)
            for group in self.optimizer.param_groups:
                group["capturable"] = True
        elif workload.graph:
            self.fallen["graph"] = "off: a CUDA graph needs a GPU"
        self.first_steps = _WARM_STEPS + 1 if self._stream is not None else _PEAK_STEP

    def train_on(self, batch: DeviceBatch, mark: Mark = unmarked) -> None:
        """Train on this batch: replay the captured step, or run it operator by operator."""
        if self._watched or self._stream is None or "graph" in self.fallen or self._taken < _WARM_STEPS - 1:
            self._run_uncaptured(batch, mark)
        elif self._taken == _WARM_STEPS - 1:
            self._rehearse(batch, mark)
        else:
            self._replay(batch, mark)
        self._taken += 1
        if self.plan is not None and batch.ids.is_cuda:
            self._correct_plan()

    @contextlib.contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run every step in the block operator by operator, so that instruments can observe it."""
        before, self._watched = self._watched, True
        try:
            with super().uncaptured():
                yield
        finally:
            self._watched = before

    def release(self) -> None:
        """Release the graph and its memory too."""
        super().release()
        if self.captured is not None:
            self.fallen["graph"] = "off: it was released"
        self.captured = self._static = None

    def _run_uncaptured(self, batch: DeviceBatch, mark: Mark) -> None:
        if self._stream is None:
            super().train_on(batch, mark)
            return
        # Run on the stream of the later capture: gradients are accumulated on the stream on which they were first made.
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            super().train_on(batch, mark)
        current.wait_stream(self._stream)

    def _correct_plan(self) -> None:
        """Correct the plan once, with the peak of the second step."""
        if self._taken == _PEAK_STEP - 1:
            torch.cuda.reset_peak_memory_stats()
        elif self._taken == _PEAK_STEP and self.workload.budget_bytes is not None:
            self.plan = fit(self, self.workload.budget_bytes, expected=self.plan)

    def _rehearse(self, batch: DeviceBatch, mark: Mark) -> None:
        """Run the last step before the capture. If something compiles in it, there is no graph, and the step runs again."""
        try:
            with settled(compiled=self._compiles()):
                self._run_uncaptured(batch, mark)
        except RuntimeError as error:
            if not self._compiles() or isinstance(error, torch.OutOfMemoryError):
                raise
            self.fallen["graph"] = f"off: compiling has not settled after {_WARM_STEPS - 1} steps: {error}"
            self.optimizer.zero_grad(set_to_none=True)
            self._run_uncaptured(batch, mark)

    def _compiles(self) -> bool:
        return self.workload.compile == "layers" or self.run.compiled

    def _replay(self, batch: DeviceBatch, mark: Mark) -> None:
        if self.captured is None:
            self._capture(batch)
        if self.captured is None or self._static is None:
            self._run_uncaptured(batch, mark)
            return
        mark("forward")
        self._static.ids.copy_(batch.ids)
        self._static.labels.copy_(batch.labels)
        self.captured.replay()
        for phase in self.phases[1:]:  # the host cannot tell the phases of a replay apart
            mark(phase)
        self.loss = self._static_loss

    def _capture(self, batch: DeviceBatch) -> None:
        """Capture the step, and capture it again with a tighter plan if the graph's pool exceeds the budget."""
        self._capture_once(batch)
        budget = self.workload.budget_bytes
        if self.captured is None or budget is None or self.plan is None:
            return
        excess = self.captured.peak_bytes() - budget
        if excess > 0:
            lost = self.captured.peak_bytes() - self.plan.peak_bytes
            self.captured = None
            self.plan = fit(self, budget, lost_bytes=lost)
            self._capture_once(batch)

    def _capture_once(self, batch: DeviceBatch) -> None:
        assert self._stream is not None
        self._static = static = DeviceBatch(batch.ids.clone(), batch.labels.clone(), None, batch.tokens, batch.padded)
        self.loss = None

        def work() -> None:
            FinetuneProgram.train_on(self, static)

        try:
            with settled(compiled=self._compiles()):
                self.captured = CapturedWork(work, self._stream, other_threads=self.batches.other_threads)
        except BuildError as error:
            self.fallen["graph"] = f"off: {error}"
            self._static = None
            self.optimizer.zero_grad(set_to_none=True)
            return
        # Every replay writes it, and it is never freed, because its memory belongs to the graph.
        self._static_loss = self.loss


def training_program(built: Built, case: Case, workload: FinetuneSpec) -> FinetuneProgram:
    """Return the program of a fine-tuning case by its engine, stock or tuned.

    Raises:
        DataError, BuildError, MissingLibraryError: as in `engines.finetune.finetune_program`, or the switches do not support
            the model or the budget.
    """
    if workload.engine == "stock":
        return finetune_program(built, case, workload)
    program: Any = finetune_program(built, case, workload, TunedProgram)
    program.prepare(workload)
    assert isinstance(program, TunedProgram)
    return program
