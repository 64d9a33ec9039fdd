"""Programs of known cost are measured exactly, and what ran is audited."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.audit.forwards import checkpointing_state
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import catalogue, finetune
from hpc_core.instruments.program import Fixed, Mark, unmarked
from hpc_core.record.job import Event, Job, Measure, Phase
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform


def measured(step: Any, steps: int, *, profile: bool = True) -> Record:
    """The record of a program, run as a step of the user's own."""
    case = Case(id="mine/known", scale="tiny", workload=CallableSpec(factory="a:b", steps=steps))
    kind = Measure(profile=profile)
    return perform(Job(case=case, kind=kind, device="cpu", launched="inline"), lambda _: None, step=step)


class Known:
    """Two products of known size on memory of known size, in two phases."""

    phases: tuple[str, ...] = ("first", "second")
    period = 1

    def __init__(self) -> None:
        self.left, self.right = torch.ones(64, 128), torch.ones(128, 32)

    def step(self, mark: Mark = unmarked) -> None:
        """Five operators: mm, t, mm, empty, zero_."""
        mark("first")
        product = self.left @ self.right
        again = product @ self.right.t()
        mark("second")
        del product
        torch.empty(100_000, dtype=torch.uint8).zero_()
        del again


def _values(record: Record) -> dict[str, float | int]:
    return {name: metric.value for name, metric in record.metrics.items()}


def test_a_program_of_known_cost_is_measured_exactly() -> None:
    """Bytes by phase and category, operators and FLOPs are those computed by hand."""
    values = _values(measured(Known(), 3))
    inputs, product, again = 4 * (64 * 128 + 128 * 32), 4 * 64 * 32, 4 * 64 * 128
    assert values["peak_first_bytes"] == inputs + product + again
    assert values["peak_second_bytes"] == inputs + again + 100_000 == values["peak_bytes"]
    assert values["at_peak_other_bytes"] == inputs
    assert values["at_peak_temporaries_bytes"] == 100_000
    assert values["at_peak_activations_bytes"] == again
    assert values["operators"] == 5
    assert values["flops"] == 2 * (2 * 64 * 128 * 32)


def test_other_tensors_of_the_process_do_not_count() -> None:
    """Tensors from before the case, which it does not use, are not its memory."""

    def tensor_bytes() -> dict[str, float | int]:
        values = _values(measured(Known(), 1))
        return {name: value for name, value in values.items() if name.endswith("_bytes") and name != "host_peak_bytes"}

    alone = tensor_bytes()
    unrelated = torch.empty(123_456, dtype=torch.uint8)
    assert tensor_bytes() == alone
    assert unrelated.nbytes == 123_456


def test_leaked_memory_is_in_the_peak() -> None:
    """Memory that every step leaves behind is at the peak as `other`, once for each step before."""

    class Leaking(Known):
        def __init__(self) -> None:
            super().__init__()
            self.leaked: list[torch.Tensor] = []

        def step(self, mark: Mark = unmarked) -> None:
            super().step(mark)
            self.leaked.append(torch.empty(5_000, dtype=torch.uint8))

    program, plain = Leaking(), _values(measured(Known(), 1))
    leaking = _values(measured(program, 1, profile=False))
    before = len(program.leaked) - 6  # the watched and the counted step, and four audited ones, come after
    assert before >= 3
    assert leaking["peak_bytes"] == plain["peak_bytes"] + 5_000 * before
    assert leaking["at_peak_other_bytes"] == plain["at_peak_other_bytes"] + 5_000 * before


def test_wall_time_includes_a_sleep() -> None:
    """Each timed step takes at least as long as it sleeps."""

    class Slow(Known):
        def step(self, mark: Mark = unmarked) -> None:
            super().step(mark)
            time.sleep(0.01)

    record = measured(Slow(), 4)
    assert len(record.wall_samples) == 4
    assert min(record.wall_samples) >= 0.01
    assert record.metrics["cold_start_s"].value >= 0.01


def test_an_unfinished_warm_up_is_noted() -> None:
    """If steps get slower and slower, warm-up ends with a note."""

    class Slower(Known):
        calls = 0

        def step(self, mark: Mark = unmarked) -> None:
            self.calls += 1
            super().step(mark)
            time.sleep(0.004 * 2 ** min(self.calls, 5) if self.calls < 11 else 0)

    record = measured(Slower(), 1)
    # From the sixth step on each takes 32 times as long as the first, never within a quarter of the fastest.
    assert sum("did not settle" in note for note in record.circumstances.notes) == 1


def test_a_fixed_program_repeats_one_step() -> None:
    """A fixed program always runs the step of its index."""

    class Counting(Known):
        steps_done = 0

        def __init__(self) -> None:
            super().__init__()
            self.indices: list[int] = []

        def step(self, mark: Mark = unmarked) -> None:
            self.indices.append(self.steps_done)
            self.steps_done += 1

    program = Counting()
    fixed = Fixed(program, 3)
    program.step()
    fixed.step()
    fixed.step()
    assert program.indices == [0, 3, 3]
    assert (fixed.period, fixed.phases) == (1, program.phases)


def test_checkpointing_follows_from_the_number_of_forwards() -> None:
    """One forward per layer and step is off, two are on, and anything else is reported in numbers."""
    assert checkpointing_state(15, 3, 5) == "off"
    assert checkpointing_state(30, 3, 5) == "on"
    assert checkpointing_state(20, 3, 5) == "partly: 20 forwards of 3 layers in 5 steps"
    assert checkpointing_state(0, 0, 5) is None


def test_losses_that_are_not_finite_void_the_run() -> None:
    """A case whose losses are not finite gives an invalid record that can be stored."""
    case = finetune(
        ModelSpec(shape="tiny", dtype="float16"), variant="full-fp16", batch=1, length=16, steps=4, learning_rate=1e6
    )
    record = perform(Job(case=case), lambda _: None)
    assert record.status == "invalid"
    assert record.reasons == ("losses_finite: asked for True, saw False.",)


FACTORY = """
import torch

def product(size):
    left = torch.ones(size, size)
    return lambda: left @ left
"""


def test_a_callable_is_measured_like_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the user's own gives time, memory, operators and FLOPs, in the usual phases."""
    (tmp_path / "my_product.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    workload = CallableSpec(factory="my_product:product", arguments={"size": 48}, steps=4)
    events: list[Event] = []
    record = perform(Job(case=Case(id="mine/product", scale="tiny", workload=workload)), events.append)
    assert record.status == "ok"
    assert len(record.wall_samples) == 4
    values = _values(record)
    assert (values["operators"], values["flops"], values["peak_bytes"]) == (1, 2 * 48**3, 2 * 4 * 48**2)
    assert [event.name for event in events if isinstance(event, Phase)] == [
        "build", "warm-up", "measure", "host", "memory", "counters", "busy", "profile", "audit", "record", "done",
    ]  # fmt: skip


def test_an_error_of_the_step_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the user's step is raised as it is."""
    (tmp_path / "my_failure.py").write_text("def make():\n    return lambda: 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    case = Case(id="mine/failure", scale="tiny", workload=CallableSpec(factory="my_failure:make"))
    with pytest.raises(ZeroDivisionError):
        perform(Job(case=case), lambda _: None)


def test_an_embedded_text_case_runs_without_a_tokenizer() -> None:
    """Random weights train on the bytes of texts."""
    case = catalogue()["tiny/lora-padded"].vary("lora-texts", source="embedded", name="paragraphs", rows=None)
    assert perform(Job(case=case), lambda _: None).status == "ok"
