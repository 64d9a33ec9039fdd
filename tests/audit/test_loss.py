"""The audit computes the loss again from the logits, so it finds a wrong mean and a wrong scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from hpc_core.catalogue import finetune, lora, tiny
from tests.audit.conftest import Run
from tests.tiny_cases import tiny_record

LORA = finetune(tiny, lora(), batch=2, length=16, steps=2)


def _scale_loss(factor: float) -> Callable[[Any], None]:
    """Multiply the model's loss."""

    def change(program: Any) -> None:
        def scale(_: Any, __: Any, output: Any) -> None:
            output.loss = output.loss * factor

        program.model.register_forward_hook(scale)

    return change


def _scale_gradient(factor: float) -> Callable[[Any], None]:
    """Multiply only the loss's gradient."""

    def change(program: Any) -> None:
        def scale(_: Any, __: Any, output: Any) -> None:
            output.loss.register_hook(lambda gradient: gradient * factor)

        program.model.register_forward_hook(scale)

    return change


@pytest.mark.parametrize("factor", [0.25, 0.98, 1.02, 4.0])
def test_a_loss_of_another_scale_voids_the_run(factor: float, run: Run) -> None:
    """A loss that is 2 % off fails two facts: it is not the mean over the labels, and its gradient is scaled."""
    record = run(LORA, program=_scale_loss(factor))

    assert record.status == "invalid"
    assert record.audit["loss"].asked == "mean over 30 labels"
    assert "by the logits" in record.audit["loss"].seen
    assert float(record.audit["loss_scale"].seen) == pytest.approx(factor, rel=0.005)


def test_a_gradient_of_another_scale_voids_the_run(run: Run) -> None:
    """A right loss with a fourfold gradient fails `loss_scale` alone."""
    record = run(LORA, program=_scale_gradient(4.0))

    assert [reason.partition(":")[0] for reason in record.reasons] == ["loss_scale"]
    assert float(record.audit["loss_scale"].seen) == pytest.approx(4, rel=0.005)


def test_the_mean_is_over_real_labels() -> None:
    """Padding counts neither in the loss nor in its scale."""
    record = tiny_record("tiny/lora-padded")
    workload: Any = record.case.workload

    assert record.reasons == ()
    labels = int(record.audit["loss"].asked.split()[2])
    assert 0 < labels < workload.batch * (workload.length - 1)


@pytest.mark.parametrize(
    "change", [{"model_dtype": "float16"}, {"model_dtype": "float32"}, {"adapter_dtype": "float16"}]
)
def test_rounding_is_no_wrong_scale(change: dict[str, Any], run: Run) -> None:
    """Loss and scale hold in every dtype."""
    record = run(LORA.vary("other", **change))

    assert record.audit["loss"].holds
    assert record.audit["loss_scale"].holds


def test_a_model_without_logits_is_a_note(run: Run) -> None:
    """Without whole logits, as with a fused loss, the two facts are missing and a note says so."""

    def hide_logits(program: Any) -> None:
        def hide(_: Any, __: Any, output: Any) -> None:
            output.logits = None if output.loss is not None else output.logits

        program.model.register_forward_hook(hide, prepend=True)

    record = run(LORA, program=hide_logits)

    assert {"loss", "loss_scale"} & set(record.audit) == set()
    assert any(note.startswith("audit: loss could not be determined") for note in record.circumstances.notes)
    assert any(note.startswith("equivalence: not checked") for note in record.circumstances.notes)
