"""AdamW inside the backward: torch's own AdamW, weight by weight, with no gradient left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.builders.assemble import build
from hpc_core.case.errors import SpecError
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, full, tiny
from hpc_core.engines.tuned.optimizer import AdamWInBackward
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.engines.tuned.program import TunedProgram, training_program
from hpc_core.instruments.owners import optimizer_tensors, owned_bytes
from hpc_core.record.job import Job
from hpc_core.worker.main import run_job


def _pair(dtype: torch.dtype, seed: int) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 5), (7,))]
    return [torch.nn.Parameter(each.clone()) for each in made], [torch.nn.Parameter(each.clone()) for each in made]


def _backward(parameters: list[torch.nn.Parameter], wanted: list[torch.Tensor]) -> None:
    torch.autograd.backward([(part * wish).sum() for part, wish in zip(parameters, wanted, strict=True)])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    steps=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rate=st.sampled_from([1e-5, 1e-3, 0.1]),
)
def test_weights_and_moments_are_those_of_torchs_fused_adamw(
    seed: int, steps: int, dtype: torch.dtype, rate: float
) -> None:
    """Whatever gradients arrive: weights to a ten-thousandth of the rate, as float32's cancelling sums allow; in bfloat16
    to a sixty-fourth of it and one of its steps, for a moment that is rounded up in one and down in the other goes on so.
    """
    mine, theirs = _pair(dtype, seed)
    in_backward = AdamWInBackward(mine, lr=rate, run=Pointwise(compiled=False))
    fused = torch.optim.AdamW(theirs, lr=rate, fused=True)
    draw = torch.Generator().manual_seed(seed + 1)
    single = dtype == torch.float32
    step_of_dtype = 2e-6 if single else 2**-7
    for _ in range(steps):
        gradients = [torch.randn(part.shape, generator=draw).to(dtype) for part in mine]
        for parameters, optimizer in ((mine, in_backward), (theirs, fused)):
            _backward(parameters, gradients)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for my, their in zip(mine, theirs, strict=True):
        torch.testing.assert_close(my, their, rtol=step_of_dtype, atol=1e-6 + rate * (1e-4 if single else 2**-6))
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                in_backward.state[my][name], fused.state[their][name], rtol=step_of_dtype, atol=step_of_dtype / 4
            )
    assert owned_bytes(optimizer_tensors(in_backward)) == owned_bytes(optimizer_tensors(fused))


def test_no_gradient_is_left_and_a_weight_without_one_is_not_counted() -> None:
    """After the backward the weight has moved and its gradient is gone; a weight that got none keeps value and count."""
    (first, second), _ = _pair(torch.float32, 3)
    optimizer = AdamWInBackward([first, second], lr=0.1, run=Pointwise(compiled=False))
    before = first.detach().clone(), second.detach().clone()
    _backward([first], [torch.ones_like(first)])
    assert first.grad is None
    assert not torch.equal(first, before[0])
    optimizer.step()
    optimizer.step()  # nothing has arrived since
    assert float(optimizer.state[first]["step"]) == 1
    assert second not in optimizer.state
    assert torch.equal(second, before[1])


def test_a_step_that_was_given_up_is_not_counted_by_the_next() -> None:
    """As after a capture that fails midway: gradients are dropped, the step is taken again, and each weight counts one."""
    (first, second), _ = _pair(torch.float32, 5)
    optimizer = AdamWInBackward([first, second], lr=0.1, run=Pointwise(compiled=False))
    _backward([first], [torch.ones_like(first)])
    optimizer.zero_grad(set_to_none=True)
    _backward([first, second], [torch.ones_like(first), torch.ones_like(second)])
    optimizer.step()
    assert [float(optimizer.state[part]["step"]) for part in (first, second)] == [1, 1]


def test_what_the_update_takes_of_memory_is_in_a_budgets_plan() -> None:
    """Where no kernel hides its float32 copies, the update of the embedding is a short step's peak: what is planned is not exceeded."""
    switches: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "optimizer_in_backward": True}
    case = finetune(tiny, full, variant="full-planned", batch=2, length=32, steps=3, budget_bytes=2**33, **switches)
    assert isinstance(case.workload, FinetuneSpec)
    program = training_program(build(case, torch.device("cpu")), case, case.workload)
    assert isinstance(program, TunedProgram)
    assert program.plan is not None
    record = run_job(Job(case=case.vary("full-tight", budget_bytes=program.plan.peak_bytes)), lambda _: None)
    assert record.status == "ok", record.reasons
    assert record.metrics["gradient_bytes"].value == 0
    assert 0.9 * program.plan.peak_bytes < record.metrics["peak_bytes"].value


def test_what_it_cannot_go_with_is_refused() -> None:
    """It is part of the fused blocks, AdamW alone, and of the tuned engine."""
    tuned = {"engine": "tuned", "loss": "chunked", "optimizer_in_backward": True}
    with pytest.raises(SpecError, match="fusion='off'"):
        FinetuneSpec(**tuned)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="adamw-8bit"):
        FinetuneSpec(**tuned, fusion="blocks", optimizer="adamw-8bit")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="belongs to engine='tuned'"):
        FinetuneSpec(optimizer_in_backward=True)
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="cannot evaluate a closure"):
        AdamWInBackward([parameter], lr=0.1, run=Pointwise(compiled=False)).step(lambda: 0.0)
