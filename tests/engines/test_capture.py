"""A captured step's memory and losses, on a real GPU: what a replay takes is seen, and what it trains is what the plain step trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hpc_core.builders.assemble import build
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.catalogue import finetune, lora, qlora, tiny
from hpc_core.engines.capture import CapturedWork
from hpc_core.engines.tuned.optimizer import AdamWInBackward
from hpc_core.engines.tuned.pointwise import Pointwise
from hpc_core.engines.tuned.program import TunedProgram, training_program
from hpc_core.engines.tuned.projection import joined, projection_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU to capture on")]
_GIB = 2**30


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


def test_a_replay_with_a_gibibyte_temporary_is_seen(device: torch.device) -> None:
    """The allocator counts the temporary of a captured work as free and a replay allocates nothing, yet the peak holds it."""
    stream = torch.cuda.Stream(device)
    result = torch.zeros((), device=device)

    def work() -> None:
        temporary = torch.ones(_GIB, dtype=torch.uint8, device=device)
        result.add_(temporary[-1])

    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    resting = torch.cuda.memory_allocated(device)
    captured = CapturedWork(work, stream)
    torch.cuda.reset_peak_memory_stats(device)
    captured.replay()
    torch.cuda.synchronize(device)
    assert torch.cuda.max_memory_allocated(device) < resting + _GIB  # what plain counters say
    assert captured.peak_bytes() >= resting + _GIB
    held, _ = captured.pool_bytes()
    assert _GIB <= held < _GIB + 64 * 2**20
    assert float(result) == 2  # run once, captured without running, replayed once


@pytest.mark.parametrize("fusion", ["off", "blocks"])
@pytest.mark.parametrize(
    "method", [lora(dropout=0.0, dtype="bfloat16"), qlora(dropout=0.0, dtype="bfloat16")], ids=["lora", "qlora"]
)
def test_a_captured_step_trains_like_the_plain_one(method: Any, fusion: Any, device: torch.device) -> None:
    """Losses of twenty steps, sixteen of them replayed, are those without a graph within bfloat16's rounding; no step waits."""
    losses: list[list[float]] = []
    for graph in (False, True):
        switches: dict[str, Any] = {"engine": "tuned", "loss": "chunked", "fusion": fusion, "graph": graph}
        case = finetune(tiny, method, batch=2, length=64, steps=3, learning_rate=1e-3, **switches)
        assert isinstance(case.workload, FinetuneSpec)
        program = training_program(build(case, device), case, case.workload)
        assert isinstance(program, TunedProgram)
        found = []
        for _ in range(20):
            program.step()
            assert program.loss is not None
            found.append(float(program.loss))
        assert (program.captured is not None, program.fallen) == (graph, {})
        losses.append(found)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    assert losses[1][-1] < losses[1][0]


def test_joined_four_bit_weights_are_each_ones_own(device: torch.device) -> None:
    """Dequantized side by side into one tensor, as only a GPU writes in place: to the bit what each gives by itself."""
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
    """Batches as wide as their longest row have many widths; past torch's limit compiling would fail. Both ways the gate is computed alike."""
    compiled, plain = Pointwise(compiled=True), Pointwise(compiled=False)
    for rows in range(20, 30):
        gate, up = torch.randn(2, rows, 64, device=device, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled("swiglu", gate, up), plain("swiglu", gate, up), rtol=2**-6, atol=2**-6)


def test_adamw_in_a_captured_backward_is_torchs_fused_one(device: torch.device) -> None:
    """Two steps and two replays, the update compiled, are four steps of AdamW in float64; torch's fused kernel is as near as its betas allow.

    It rounds them to float32 before it subtracts them from one (`fused_adam_utils.cuh`), so its moments grow by a share that is off.
    """
    draw = torch.Generator().manual_seed(7)
    shapes = ((512, 96), (96,))
    begun, wanted = ([torch.randn(shape, generator=draw).to(device) for shape in shapes] for _ in range(2))
    mine, theirs = ([torch.nn.Parameter(each.clone()) for each in begun] for _ in range(2))
    exact = [torch.nn.Parameter(each.double()) for each in begun]
    ours = AdamWInBackward(mine, lr=1e-3, run=Pointwise(compiled=True))
    fused = torch.optim.AdamW(theirs, lr=1e-3, fused=True)
    reference = torch.optim.AdamW(exact, lr=1e-3)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        torch.autograd.backward([(part * wish).sum() for part, wish in zip(parameters, wanted, strict=True)])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(mine, ours)
    current.wait_stream(stream)
    captured = CapturedWork(lambda: step(mine, ours), stream)
    for _ in range(2):
        captured.replay()
    for _ in range(4):
        step(theirs, fused)
        step(exact, reference)
    by_betas = {
        name: abs(float(1 - torch.tensor(beta)) / (1 - beta) - 1)
        for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999))
    }
    for my, their, true in zip(mine, theirs, exact, strict=True):
        torch.testing.assert_close(my.double(), true, rtol=2e-6, atol=1e-6 + 1e-3 * 1e-4)
        for name, off in by_betas.items():
            moment = reference.state[true][name]
            torch.testing.assert_close(ours.state[my][name].double(), moment, rtol=2e-6, atol=5e-7)
            torch.testing.assert_close(fused.state[their][name].double(), moment, rtol=2e-6 + off, atol=5e-7)
        assert float(ours.state[my]["step"]) == float(fused.state[their]["step"]) == 4
