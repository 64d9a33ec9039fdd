"""The loss and its scale: worked out again from the logits, so that neither a wrong mean nor a wrong factor passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpc_core.case.case import Case
from hpc_core.catalogue import TINY, finetune, lora, tiny
from hpc_core.engines.finetune import finetune_program
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.worker.perform import perform

LORA = finetune(tiny, lora(), batch=2, length=16, steps=2)


def _perform(case: Case, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None] = lambda _: None) -> Record:
    def program(*arguments: Any) -> Any:
        made = finetune_program(*arguments)
        change(made)
        return made

    monkeypatch.setattr("hpc_core.engines.finetune.finetune_program", program)
    return perform(Job(case=case, launched="inline", device="cpu"), lambda _: None)


def _times(factor: float) -> Callable[[Any], None]:
    """The model's loss is so many times what it should be."""

    def change(program: Any) -> None:
        def scale(_: Any, __: Any, output: Any) -> None:
            output.loss = output.loss * factor

        program.model.register_forward_hook(scale)

    return change


def _backward_times(factor: float) -> Callable[[Any], None]:
    """Only the gradient is so many times what it should be; the loss is right."""

    def change(program: Any) -> None:
        def scale(_: Any, __: Any, output: Any) -> None:
            output.loss.register_hook(lambda gradient: gradient * factor)

        program.model.register_forward_hook(scale)

    return change


@pytest.mark.parametrize("factor", [0.25, 0.98, 1.02, 4.0])
def test_a_loss_of_another_scale_voids_the_run(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is 2 % off is named twice: it is no mean over the labels, and its gradient is off by as much."""
    record = _perform(LORA, monkeypatch, _times(factor))

    assert record.status == "invalid"
    assert record.audit["loss"].asked == "mean over 30 labels"
    assert "by the logits" in record.audit["loss"].seen
    assert float(record.audit["loss_scale"].seen) == pytest.approx(factor, rel=0.005)


def test_a_gradient_of_another_scale_voids_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is right, and goes backward four times as large, is caught by its gradient alone."""
    record = _perform(LORA, monkeypatch, _backward_times(4.0))

    assert [reason.partition(":")[0] for reason in record.reasons] == ["loss_scale"]
    assert float(record.audit["loss_scale"].seen) == pytest.approx(4, rel=0.005)


def test_the_mean_is_over_real_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded places count neither in the loss nor in its scale."""
    case = next(case for case in TINY if case.id == "tiny/lora-padded")
    record = _perform(case, monkeypatch)

    assert record.reasons == ()
    places = int(record.audit["loss"].asked.split()[2])
    assert 0 < places < case.workload.batch * (case.workload.length - 1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change", [{"model_dtype": "float16"}, {"model_dtype": "float32"}, {"adapter_dtype": "float16"}]
)
def test_rounding_is_no_wrong_scale(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every dtype the scale is seen as one."""
    record = _perform(LORA.vary("other", **change), monkeypatch)

    assert record.audit["loss"].holds
    assert record.audit["loss_scale"].holds


def test_a_model_without_logits_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that never had whole logits, as a fused one, costs two facts and is no mismatch."""

    def hide(program: Any) -> None:
        def gone(_: Any, __: Any, output: Any) -> None:
            output.logits = None if output.loss is not None else output.logits

        program.model.register_forward_hook(gone, prepend=True)

    record = _perform(LORA, monkeypatch, hide)

    assert {"loss", "loss_scale"} & set(record.audit) == set()
    assert any(note.startswith("audit: loss could not be determined") for note in record.circumstances.notes)
    assert any(note.startswith("equivalence: not checked") for note in record.circumstances.notes)
