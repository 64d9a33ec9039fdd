"""The stock training loop equals one written by hand, with masks, packing and every optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import build
from hpc_core.builders.data.batching import batches
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError
from hpc_core.case.parts import DataSpec, ModelSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, full, lora, qlora, tiny
from hpc_core.engines.finetune import finetune_program, make_optimizer
from hpc_core.instruments.owners import optimizer_tensors
from tests.engines.conftest import losses_of, program_of

CPU = torch.device("cpu")
FLOAT = ModelSpec(shape="tiny", dtype="float32")
TRACE = DataSpec(source="trace", name="gsm8k", rows=40)
FORMS: dict[str, dict[str, Any]] = {
    "random": {},
    "longest": {"data": TRACE, "padding": "longest"},
    "max-length": {"data": TRACE, "padding": "max_length"},
    "packed": {"data": TRACE, "packing": True},
}


def _by_hand(case: Case, steps: int) -> list[float]:
    """Losses of the same training without the program's code: own loss, own AdamW, and no mask where none is needed."""
    workload = case.workload
    assert isinstance(workload, FinetuneSpec)
    model = build(case, CPU).model
    count = workload.batch * workload.steps if workload.data.source == "random" else workload.data.rows
    length = None if workload.packing else workload.length
    rows = token_rows(workload.data, count=count, length=length, vocab_size=1024, tokenizer=None)
    data = list(batches(rows, workload))
    moments: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    losses = []
    for step in range(steps):
        batch = data[step]
        ids, labels = torch.tensor(batch.ids), torch.tensor(batch.labels)
        logits = model(input_ids=ids, attention_mask=None if batch.mask is None else torch.tensor(batch.mask)).logits
        log_probabilities, targets = logits[:, :-1].reshape(-1, 1024).log_softmax(-1), labels[:, 1:].reshape(-1)
        real = targets != -100
        loss = -log_probabilities[real, targets[real]].mean()
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    _adamw(parameter, moments, name, step + 1, workload.learning_rate)
    return losses


def _adamw(parameter: torch.nn.Parameter, moments: dict[str, Any], name: str, step: int, rate: float) -> None:
    assert parameter.grad is not None
    first, second = moments.get(name, (torch.zeros_like(parameter), torch.zeros_like(parameter)))
    first, second = 0.9 * first + 0.1 * parameter.grad, 0.999 * second + 0.001 * parameter.grad**2
    moments[name] = (first, second)
    parameter.mul_(1 - rate * 0.01)
    parameter.sub_(rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
    parameter.grad = None


@pytest.mark.parametrize("method", [full, lora(dropout=0.0)], ids=["full", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_three_steps_equal_a_loop_written_by_hand(form: str, method: Any) -> None:
    """The losses of three steps are those of a loop that shares no code with the program."""
    case = finetune(FLOAT, method, batch=2, length=48, steps=3, learning_rate=3e-3, **FORMS[form])
    losses = losses_of(program_of(case), 3)
    assert losses == pytest.approx(_by_hand(case, 3), rel=2e-5)
    assert len(set(losses)) == 3


@pytest.mark.parametrize("padding", ["longest", "max_length"])
def test_a_padded_row_counts_like_the_row_alone(padding: Any) -> None:
    """A padded batch's loss is the token-weighted mean of its rows' losses without padding."""
    program = program_of(finetune(FLOAT, full, batch=4, length=300, steps=1, data=TRACE, padding=padding))
    batch = program.batches[0]
    assert batch.mask is not None
    assert batch.padded == int((batch.mask == 0).sum()) > 0
    total, count = 0.0, 0
    for row, mask in zip(batch.ids, batch.mask, strict=True):
        ids = row[mask.bool()].unsqueeze(0)
        with torch.no_grad():
            total += float(program.model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert losses_of(program, 1)[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    ("method", "remains"),
    [(full, 0.5), (lora(dropout=0.0), 0.97), (qlora(compute_dtype="float32", dropout=0.0), 0.97)],
    ids=["full", "lora", "qlora"],
)
def test_the_loss_falls(method: Any, remains: float) -> None:
    """Thirty steps at a high learning rate lower the loss."""
    program = program_of(finetune(FLOAT, method, batch=2, length=16, steps=2, learning_rate=2e-2))
    losses = losses_of(program, 30)
    assert sum(losses[-2:]) < remains * sum(losses[:2])


@pytest.mark.parametrize("optimizer", ["adamw-fused", "adamw-foreach"])
def test_both_forms_of_adamw_train_alike(optimizer: Any) -> None:
    """Fused and foreach AdamW give the same losses, with two moments and a count per parameter."""
    program = program_of(
        finetune(FLOAT, lora(dropout=0.0), batch=2, length=16, steps=2, learning_rate=1e-2, optimizer=optimizer)
    )
    reference = program_of(finetune(FLOAT, lora(dropout=0.0), batch=2, length=16, steps=2, learning_rate=1e-2))
    assert losses_of(program, 4) == pytest.approx(losses_of(reference, 4), rel=1e-5)
    assert len(optimizer_tensors(program.optimizer)) == 3 * 24


def test_eight_bit_adamw_keeps_smaller_moments() -> None:
    """bitsandbytes' 8-bit AdamW stores a large parameter's moments in bytes, and lowers a loss."""
    weight = torch.nn.Parameter(torch.ones(128, 64))
    workload = FinetuneSpec(optimizer="adamw-8bit", learning_rate=0.1)
    optimizer = make_optimizer(workload, [weight])
    for _ in range(3):
        torch.autograd.backward(weight.square().sum())
        optimizer.step()
        optimizer.zero_grad()
    assert float(weight.detach().square().sum()) < 0.8 * weight.numel()
    assert (
        sum(tensor.numel() for tensor in optimizer_tensors(optimizer) if tensor.dtype == torch.uint8)
        == 2 * weight.numel()
    )


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights() -> None:
    """Autocast's loss is near float32's but not equal, and the weights stay float32."""
    changes: dict[str, Any] = {"batch": 2, "length": 16, "steps": 1}
    plain = losses_of(program_of(finetune(FLOAT, full, **changes)), 1)[0]
    program = program_of(finetune(FLOAT, full, precision="autocast-bf16", **changes))
    loss = losses_of(program, 1)[0]
    assert loss != plain
    assert loss == pytest.approx(plain, rel=1e-2)
    assert {parameter.dtype for parameter in program.model.parameters()} == {torch.float32}


def test_steps_cycle_through_the_batches() -> None:
    """Batches repeat in order, and tokens and padding are summed from the first one."""
    program = program_of(finetune(tiny, lora(), batch=2, length=64, steps=3, data=TRACE, padding="longest"))
    assert len(program.batches) == program.period == 3
    tokens, padded = [batch.tokens for batch in program.batches], [batch.padded for batch in program.batches]
    assert program.tokens_of(7) == 2 * sum(tokens) + tokens[0]
    assert program.padded_of(4) == sum(padded) + padded[0]
    assert program.batches[program.widest].ids.shape[1] == max(batch.ids.shape[1] for batch in program.batches)
    inputs: list[torch.Tensor] = []
    program.model.register_forward_pre_hook(lambda _, __, kwargs: inputs.append(kwargs["input_ids"]), with_kwargs=True)
    for _ in range(4):
        program.step()
    assert [torch.equal(inputs[3], ids) for ids in inputs] == [True, False, False, True]


def test_equal_shapes_have_period_one() -> None:
    """Unpadded, packed and fully padded batches have equal shapes, so the program has period one."""
    for form in ("random", "packed", "max-length"):
        assert program_of(finetune(tiny, lora(), batch=2, length=32, steps=3, **FORMS[form])).period == 1


def test_a_step_marks_its_phases_and_leaves_no_gradient() -> None:
    """A step marks each phase once in order, and leaves only its loss."""
    program = program_of(finetune(tiny, lora(), batch=1, length=8, steps=1))
    marks: list[str] = []
    program.step(marks.append)
    assert tuple(marks) == program.phases == ("forward", "backward", "optimizer")
    assert all(parameter.grad is None for parameter in program.model.parameters())
    assert program.loss is not None
    assert not program.loss.requires_grad


def test_a_model_that_trains_nothing_is_refused() -> None:
    """A model without a trainable parameter is refused."""
    case = finetune(tiny, full, batch=1, length=8, steps=1)
    assert isinstance(case.workload, FinetuneSpec)
    built = build(case, CPU)
    built.model.requires_grad_(False)
    with pytest.raises(BuildError, match="tiny/full trains nothing"):
        finetune_program(built, case, case.workload)
