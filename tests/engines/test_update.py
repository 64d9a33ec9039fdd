"""AdamW inside the backward equals torch's own, weight by weight, and leaves no gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_core.catalogue import finetune, full, tiny
from hpc_core.engines.tuned.optimizer import AdamWInBackward
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.instruments.owners import optimizer_tensors, owned_bytes
from hpc_core.record.job import Job
from hpc_core.worker.main import run_job
from tests.engines.conftest import tuned_program_of


def _pair(dtype: torch.dtype, seed: int) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=draw).to(dtype) for shape in ((3, 5), (7,))]
    return [torch.nn.Parameter(each.clone()) for each in made], [torch.nn.Parameter(each.clone()) for each in made]


def _backward(parameters: list[torch.nn.Parameter], gradients: list[torch.Tensor]) -> None:
    pairs = zip(parameters, gradients, strict=True)
    torch.autograd.backward([(parameter * gradient).sum() for parameter, gradient in pairs])


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
    """For any gradients, weights differ by at most 1e-4 of the rate in float32, and in bfloat16 by 1/64 and one rounding.

    Float32's sums cancel differently; in bfloat16 moments that are rounded apart once stay apart.
    """
    parameters, copies = _pair(dtype, seed)
    in_backward = AdamWInBackward(parameters, lr=rate, run=Pointwise(compiled=False))
    fused = torch.optim.AdamW(copies, lr=rate, fused=True)
    draw = torch.Generator().manual_seed(seed + 1)
    single = dtype == torch.float32
    rounding = 2e-6 if single else 2**-7
    for _ in range(steps):
        gradients = [torch.randn(part.shape, generator=draw).to(dtype) for part in parameters]
        for trained, optimizer in ((parameters, in_backward), (copies, fused)):
            _backward(trained, gradients)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    for parameter, copy in zip(parameters, copies, strict=True):
        torch.testing.assert_close(parameter, copy, rtol=rounding, atol=1e-6 + rate * (1e-4 if single else 2**-6))
        for name in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(
                in_backward.state[parameter][name], fused.state[copy][name], rtol=rounding, atol=rounding / 4
            )
    assert owned_bytes(optimizer_tensors(in_backward)) == owned_bytes(optimizer_tensors(fused))


def test_no_gradient_is_left_and_a_weight_without_one_is_not_counted() -> None:
    """After the backward a weight has moved and its gradient is gone; a weight without a gradient keeps value and count."""
    (first, second), _ = _pair(torch.float32, 3)
    optimizer = AdamWInBackward([first, second], lr=0.1, run=Pointwise(compiled=False))
    before = first.detach().clone(), second.detach().clone()
    _backward([first], [torch.ones_like(first)])
    assert first.grad is None
    assert not torch.equal(first, before[0])
    optimizer.step()
    optimizer.step()  # without a new gradient
    assert float(optimizer.state[first]["step"]) == 1
    assert second not in optimizer.state
    assert torch.equal(second, before[1])


def test_an_abandoned_step_is_not_counted() -> None:
    """If gradients are dropped and the step is repeated, as after a failed capture, each weight counts one step."""
    (first, second), _ = _pair(torch.float32, 5)
    optimizer = AdamWInBackward([first, second], lr=0.1, run=Pointwise(compiled=False))
    _backward([first], [torch.ones_like(first)])
    optimizer.zero_grad(set_to_none=True)
    _backward([first, second], [torch.ones_like(first), torch.ones_like(second)])
    optimizer.step()
    assert [float(optimizer.state[part]["step"]) for part in (first, second)] == [1, 1]


def test_the_plan_includes_the_updates_memory() -> None:
    """The memory plan includes the update's float32 copies, the peak of a short step."""
    switches: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": "blocks", "optimizer_in_backward": True}
    case = finetune(tiny, full, variant="full-planned", batch=2, length=32, steps=3, budget_bytes=2**33, **switches)
    program = tuned_program_of(case)
    assert program.plan is not None
    record = run_job(Job(case=case.vary("full-tight", budget_bytes=program.plan.peak_bytes)), lambda _: None)
    assert record.status == "ok", record.reasons
    assert record.metrics["gradient_bytes"].value == 0
    assert 0.9 * program.plan.peak_bytes < record.metrics["peak_bytes"].value


def test_a_closure_is_refused() -> None:
    """The optimizer cannot evaluate a closure, because its steps are taken in the backward."""
    parameter = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="cannot evaluate a closure"):
        AdamWInBackward([parameter], lr=0.1, run=Pointwise(compiled=False)).step(lambda: 0.0)
