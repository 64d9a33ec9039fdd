"""What several tests of engines need: the first GPU, a case's training program, its losses, and errors of tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from hpc_core.builders.assemble import build
from hpc_core.case.case import Case
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.engines.tuned.program import TunedProgram, training_program

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda", 0)


def program_of(case: Case, device: torch.device = CPU) -> FinetuneProgram:
    """Build a fine-tuning case and return its program, stock or tuned."""
    assert isinstance(case.workload, FinetuneSpec)
    return training_program(build(case, device), case, case.workload)


def tuned_program_of(case: Case, device: torch.device = CPU) -> TunedProgram:
    """Build a case of the tuned engine and return its program."""
    program = program_of(case, device)
    assert isinstance(program, TunedProgram)
    return program


def small_qwen2(seed: int) -> Any:
    """A Qwen2 of random weights, whose query, key and value projections have biases that matter."""
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = transformers.Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.3)
    return model


def losses_of(program: Any, steps: int) -> list[float]:
    """The losses of so many steps."""
    losses = []
    for _ in range(steps):
        program.step()
        assert program.loss is not None
        losses.append(float(program.loss))
    return losses


def relative_error(computed: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of the expected tensor."""
    computed, expected = computed.detach().float(), expected.detach().float()
    return float((computed - expected).norm() / expected.norm())


def randomize(model: Any) -> Any:
    """Move matrices at random, so that greedy answers are not one token repeated."""
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.is_floating_point():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
