"""The measuring path itself: known bytes, operators and FLOPs come out, and what ran is audited."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpc_core.audit.forwards import checkpointing_seen
from hpc_core.builders.adapter import attach_adapter
from hpc_core.builders.assemble import enable_checkpointing
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import catalogue, finetune, lora, tiny
from hpc_core.instruments.program import Fixed, Mark, unmarked
from hpc_core.record.job import Event, Job, Phase
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform


def measured(step: Any, steps: int) -> Record:
    """The record of a program as a step of the user's own."""
    case = Case(id="mine/known", scale="tiny", workload=CallableSpec(factory="a:b", steps=steps))
    return perform(Job(case=case, device="cpu", launched="inline"), lambda _: None, step=step)


class Known:
    """Two products of known size on memory of known size, in two phases."""

    phases: tuple[str, ...] = ("first", "second")
    period = 1

    def __init__(self) -> None:
        self.left, self.right = torch.ones(64, 128), torch.ones(128, 32)

    def step(self, mark: Mark = unmarked) -> None:
        """5 operators: mm, t, mm, empty, zero_."""
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
    """Bytes by phase and category, operators and FLOPs are those worked out by hand."""
    values = _values(measured(Known(), 3))
    given, product, again = 4 * (64 * 128 + 128 * 32), 4 * 64 * 32, 4 * 64 * 128
    assert values["peak_first_bytes"] == given + product + again
    assert values["peak_second_bytes"] == max(given + again + 100_000, given + product + again) == values["peak_bytes"]
    assert values["at_peak_other_bytes"] == given
    assert values["at_peak_temporaries_bytes"] == 100_000
    assert values["at_peak_activations_bytes"] == again
    assert values["operators"] == 5
    assert values["flops"] == 2 * (2 * 64 * 128 * 32)


def test_twice_the_work_is_seen_as_twice_the_work() -> None:
    """A program that does its step twice has twice the operators and FLOPs and the same peak."""

    class Twice(Known):
        def step(self, mark: Mark = unmarked) -> None:
            super().step(mark)
            super().step()

    once, twice = _values(measured(Known(), 2)), _values(measured(Twice(), 2))
    assert twice["operators"] == 2 * once["operators"]
    assert twice["flops"] == 2 * once["flops"]
    assert twice["peak_bytes"] == once["peak_bytes"]


def test_a_thousand_more_bytes_are_seen_to_the_byte() -> None:
    """A step that holds a little more has exactly that much higher a peak."""

    class Wasteful(Known):
        def step(self, mark: Mark = unmarked) -> None:
            extra = torch.empty(1000, dtype=torch.uint8)
            super().step(mark)
            del extra

    plain, more = _values(measured(Known(), 1)), _values(measured(Wasteful(), 1))
    assert more["peak_bytes"] == plain["peak_bytes"] + 1000
    assert more["operators"] == plain["operators"] + 1


def test_what_else_lives_in_the_process_changes_nothing() -> None:
    """Tensors that were there before the case, and that it does not touch, are not its memory."""
    plain = _values(measured(Known(), 1))
    bystander = torch.empty(123_456, dtype=torch.uint8)
    beside = _values(measured(Known(), 1))
    assert bystander.nbytes == 123_456
    assert {name: value for name, value in beside.items() if name.endswith("_bytes") and name != "host_peak_bytes"} == {
        name: value for name, value in plain.items() if name.endswith("_bytes") and name != "host_peak_bytes"
    }


def test_a_forgotten_reference_is_seen() -> None:
    """Memory that every step leaves behind is in the peak, as other, for each step before."""

    class Leaking(Known):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[torch.Tensor] = []

        def step(self, mark: Mark = unmarked) -> None:
            super().step(mark)
            self.kept.append(torch.empty(5_000, dtype=torch.uint8))

    program, plain = Leaking(), _values(measured(Known(), 1))
    leaking = _values(measured(program, 1))
    before = len(program.kept) - 3  # without the watched step's own, and the counted and the profiled step's after it
    assert before >= 3
    assert leaking["peak_bytes"] == plain["peak_bytes"] + 5_000 * before
    assert leaking["at_peak_other_bytes"] == plain["at_peak_other_bytes"] + 5_000 * before


def test_timing_sees_a_sleep() -> None:
    """Wall time of each timed step is that of the step."""

    class Slow(Known):
        def step(self, mark: Mark = unmarked) -> None:
            super().step(mark)
            time.sleep(0.01)

    record = measured(Slow(), 4)
    assert len(record.wall_samples) == 4
    assert min(record.wall_samples) >= 0.01
    assert record.metrics["cold_start_s"].value >= 0.01


def test_a_program_that_never_settles_is_noted() -> None:
    """Warm-up ends, and says so, when steps get slower and slower."""

    class Slower(Known):
        calls = 0

        def step(self, mark: Mark = unmarked) -> None:
            self.calls += 1
            super().step(mark)
            time.sleep(0.004 * 2 ** min(self.calls, 5) if self.calls < 11 else 0)

    record = measured(Slower(), 1)
    settled = [note for note in record.circumstances.notes if "did not settle" in note]
    # The sixth and later steps sleep alike, 32 times the first: never within a quarter of the fastest.
    assert len(settled) == 1


def test_a_fixed_program_does_the_same_step_again() -> None:
    """Whatever the program has done, its fixed form stays at one index."""

    class Counting(Known):
        steps_done = 0

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def step(self, mark: Mark = unmarked) -> None:
            self.seen.append(self.steps_done)
            self.steps_done += 1

    program = Counting()
    fixed = Fixed(program, 3)
    program.step()
    fixed.step()
    fixed.step()
    assert program.seen == [0, 3, 3]
    assert (fixed.period, fixed.phases) == (1, program.phases)


def test_what_checkpointing_looks_like() -> None:
    """One forward a layer and step is off, two are on, anything else is told in numbers."""
    assert checkpointing_seen(15, 3, 5) == "off"
    assert checkpointing_seen(30, 3, 5) == "on"
    assert checkpointing_seen(20, 3, 5) == "partly: 20 forwards of 3 layers in 5 steps"
    assert checkpointing_seen(0, 0, 5).startswith("unknown")


def _tiny(checkpointing: Any, variant: str) -> Case:
    return finetune(tiny, lora(), variant=variant, batch=1, length=16, steps=1, checkpointing=checkpointing)


def test_a_model_that_checkpoints_unasked_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that asks for no checkpointing and gets it is invalid, and the reason says both."""
    monkeypatch.setattr(
        "hpc_core.builders.assemble.enable_checkpointing",
        lambda model, _, **more: enable_checkpointing(model, "non-reentrant", **more),
    )
    record = perform(Job(case=_tiny("off", "lora")), lambda _: None)
    assert record.status == "invalid"
    assert record.reasons == ("checkpointing: asked for 'off', saw 'on'.",)
    assert not record.audit["checkpointing"].holds


def test_a_model_that_does_not_checkpoint_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case that asks for checkpointing and does not get it is invalid too."""
    monkeypatch.setattr("hpc_core.builders.assemble.enable_checkpointing", lambda *_, **__: None)
    record = perform(Job(case=_tiny("reentrant", "lora-gc")), lambda _: None)
    assert (record.status, record.reasons) == ("invalid", ("checkpointing: asked for 'on', saw 'off'.",))


def test_an_adapter_of_another_dtype_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter weights that are not stored as asked are an invalid run."""
    monkeypatch.setattr(
        "hpc_core.builders.assemble.attach_adapter", lambda model, spec: attach_adapter(model, spec).to(torch.bfloat16)
    )
    record = perform(Job(case=_tiny("off", "lora")), lambda _: None)
    assert record.reasons == ("adapter_dtype: asked for ['float32'], saw ['bfloat16'].",)


def test_losses_that_are_not_finite_void_the_run() -> None:
    """A learning rate that destroys the model gives an invalid record that can still be stored."""
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


def test_a_callable_is_measured_like_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step from the user's module gives time, memory, operators and FLOPs, and its phases are told."""
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
        "build", "warm-up", "measure", "memory", "counters", "busy", "profile", "record", "done",
    ]  # fmt: skip


def test_a_step_that_fails_tells_its_own_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the code under test is passed on as it is."""
    (tmp_path / "my_failure.py").write_text("def make():\n    return lambda: 1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    case = Case(id="mine/failure", scale="tiny", workload=CallableSpec(factory="my_failure:make"))
    with pytest.raises(ZeroDivisionError):
        perform(Job(case=case), lambda _: None)


def test_an_embedded_text_case_runs_without_a_tokenizer() -> None:
    """Random weights with texts train on bytes."""
    case = catalogue()["tiny/lora-padded"].vary("lora-texts", source="embedded", name="paragraphs", rows=None)
    assert perform(Job(case=case), lambda _: None).status == "ok"
