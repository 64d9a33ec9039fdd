"""Memory and losses of captured steps on a real GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import build
from hpc_core.catalogue import finetune, lora, qlora, tiny
from hpc_core.engines.capture import CapturedWork
from hpc_core.engines.tuned.optimizer import AdamWInBackward
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.engines.tuned.projection import joined, projection_of
from tests.engines.conftest import losses_of, tuned_program_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to capture on")]
_GIB = 2**30


def test_the_peak_includes_temporaries_of_a_replay(device: torch.device) -> None:
    """A replay allocates nothing, so plain counters miss a temporary of the captured work; `peak_bytes` includes it."""
    stream = torch.cuda.Stream(device)
    result = torch.zeros((), device=device)

    def work() -> None:
        temporary = torch.ones(_GIB, dtype=torch.uint8, device=device)
        result.add_(temporary[-1])

    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    captured = CapturedWork(work, stream)
    torch.cuda.reset_peak_memory_stats(device)
    captured.replay()
    torch.cuda.synchronize(device)
    assert torch.cuda.max_memory_allocated(device) < before + _GIB
    assert captured.peak_bytes() >= before + _GIB
    pool, _ = captured.pool_bytes()
    assert _GIB <= pool < _GIB + 64 * 2**20
    assert float(result) == 2  # run once, captured without running, replayed once


@pytest.mark.parametrize("fusion", ["off", "blocks"])
@pytest.mark.parametrize(
    "method", [lora(dropout=0.0, dtype="bfloat16"), qlora(dropout=0.0, dtype="bfloat16")], ids=["lora", "qlora"]
)
def test_a_captured_step_trains_like_the_plain_one(method: Any, fusion: Any, device: torch.device) -> None:
    """The losses of twenty steps, sixteen of them replayed, are those without a graph, up to bfloat16's rounding."""
    losses: list[list[float]] = []
    for graph in (False, True):
        switches: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": fusion, "graph": graph}
        case = finetune(tiny, method, batch=2, length=64, steps=3, learning_rate=1e-3, **switches)
        program = tuned_program_of(case, device)
        losses.append(losses_of(program, 20))
        assert (program.captured is not None, program.fallen) == (graph, {})
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][-1] < losses[1][0]


def test_joined_four_bit_weights_equal_separate_ones(device: torch.device) -> None:
    """Weights dequantized side by side into one tensor equal each weight dequantized alone, bit for bit."""
    case = finetune(tiny, qlora(dropout=0.0, dtype="bfloat16"), variant="joined", batch=2, length=64)
    model: Any = build(case, device).model
    attention = model.get_base_model().model.layers[0].self_attn
    parts = [projection_of(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj")]
    whole = joined(parts, torch.bfloat16)
    assert whole is not None
    assert whole.whole is None
    side_by_side = whole.dense(torch.empty(0, dtype=torch.bfloat16, device=device))
    assert torch.equal(side_by_side, torch.cat([part.dense(None, torch.bfloat16) for part in parts]))


def test_kernels_between_products_take_more_shapes_than_torchs_eight(device: torch.device) -> None:
    """Compiled kernels take more shapes than torch's default limit of eight, and equal the plain ones."""
    compiled, plain = Pointwise(compiled=True), Pointwise(compiled=False)
    for rows in range(20, 30):
        gate, up = torch.randn(2, rows, 64, device=device, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled("swiglu", gate, up), plain("swiglu", gate, up), rtol=2**-6, atol=2**-6)


def test_adamw_in_a_captured_backward_is_torchs_fused_one(device: torch.device) -> None:
    """Two steps and two replays, with a compiled update, equal four steps of AdamW in float64.

    torch's fused kernel rounds the betas to float32 before it subtracts them from one (`fused_adam_utils.cuh`), so its
    moments differ by that rounding.
    """
    draw = torch.Generator().manual_seed(7)
    shapes = ((512, 96), (96,))
    initial, gradients = ([torch.randn(shape, generator=draw).to(device) for shape in shapes] for _ in range(2))
    captured_parameters, fused_parameters = ([torch.nn.Parameter(each.clone()) for each in initial] for _ in range(2))
    exact_parameters = [torch.nn.Parameter(each.double()) for each in initial]
    in_backward = AdamWInBackward(captured_parameters, lr=1e-3, run=Pointwise(compiled=True))
    fused = torch.optim.AdamW(fused_parameters, lr=1e-3, fused=True)
    reference = torch.optim.AdamW(exact_parameters, lr=1e-3)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        pairs = zip(parameters, gradients, strict=True)
        torch.autograd.backward([(parameter * gradient).sum() for parameter, gradient in pairs])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(captured_parameters, in_backward)
    current.wait_stream(stream)
    captured = CapturedWork(lambda: step(captured_parameters, in_backward), stream)
    for _ in range(2):
        captured.replay()
    for _ in range(4):
        step(fused_parameters, fused)
        step(exact_parameters, reference)
    rounding_of_betas = {
        name: abs(float(1 - torch.tensor(beta)) / (1 - beta) - 1)
        for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999))
    }
    for own, torchs, exact in zip(captured_parameters, fused_parameters, exact_parameters, strict=True):
        torch.testing.assert_close(own.double(), exact, rtol=2e-6, atol=1e-6 + 1e-3 * 1e-4)
        for name, rounding in rounding_of_betas.items():
            moment = reference.state[exact][name]
            torch.testing.assert_close(in_backward.state[own][name].double(), moment, rtol=2e-6, atol=5e-7)
            torch.testing.assert_close(fused.state[torchs][name].double(), moment, rtol=2e-6 + rounding, atol=5e-7)
        assert float(in_backward.state[own]["step"]) == float(fused.state[torchs]["step"]) == 4
