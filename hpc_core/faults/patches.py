"""The patches behind the faults: each replaces a function of transformers, peft, torch or hpc-core, as a careless change would.

They stay for the life of the process, which a worker's is: one case.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.build import assemble
from hpc_core.build.adapter import adapter_parameters
from hpc_core.build.libraries import library
from hpc_core.faults.catalogue import Injection

__all__ = ["checkpointing_off", "extra_kernel", "float32_adapters", "rank_16", "retained_tensor"]

_RETAINED_BYTES = 64 * 2**20


def checkpointing_off(injection: Injection) -> None:
    """transformers' switch does nothing."""
    transformers: Any = library("transformers", "This fault")

    def nothing(*_: Any, **__: Any) -> None:
        injection.hit()

    transformers.PreTrainedModel.gradient_checkpointing_enable = nothing


def retained_tensor(injection: Injection) -> None:
    """The first optimizer step keeps a tensor alive for good."""
    original = torch.optim.AdamW.step
    kept: list[torch.Tensor] = []

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kept:
            device = self.param_groups[0]["params"][0].device
            kept.append(torch.empty(_RETAINED_BYTES, dtype=torch.uint8, device=device))
            injection.hit()
        return original(self, *args, **kwargs)

    setattr(torch.optim.AdamW, "step", step)  # noqa: B010 - mypy forbids assigning to a method


def extra_kernel(injection: Injection) -> None:
    """Every decoder layer adds zero to its result."""
    llama: Any = library("transformers.models.llama.modeling_llama", "This fault")
    original = llama.LlamaMLP.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        injection.hit()
        return original(self, *args, **kwargs) + 0

    llama.LlamaMLP.forward = forward


def float32_adapters(injection: Injection) -> None:
    """Adapter weights are cast to float32 after they were attached."""
    original = assemble.__dict__["attach_adapter"]

    def attach(*args: Any, **kwargs: Any) -> torch.nn.Module:
        model: torch.nn.Module = original(*args, **kwargs)
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.float()
        injection.hit()
        return model

    setattr(assemble, "attach_adapter", attach)  # noqa: B010


def rank_16(injection: Injection) -> None:
    """peft's LoraConfig takes 16 for any rank."""
    peft: Any = library("peft", "This fault")
    original = peft.LoraConfig

    def config(*args: Any, **kwargs: Any) -> Any:
        injection.hit()
        return original(*args, **{**kwargs, "r": 16})

    peft.LoraConfig = config
