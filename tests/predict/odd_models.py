"""Models that prediction cannot handle. Each function changes the tiny case's model in the predicting process."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["compiled_late", "compiled_module", "custom_operator"]


def _mlp() -> Any:
    from transformers.models.llama.modeling_llama import LlamaMLP

    return LlamaMLP


def custom_operator() -> None:
    """Every MLP doubles its result with a custom operator that has a fake."""
    doubled = torch.library.custom_op("odd_models::doubled", _double, mutates_args=())
    doubled.register_fake(torch.empty_like)
    original = _mlp().forward
    _mlp().forward = lambda self, x: doubled(original(self, x))


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def compiled_late() -> None:
    """Every MLP is compiled when it is called."""
    original: Any = _mlp().forward
    untyped_torch: Any = torch
    _mlp().forward = lambda self, x: untyped_torch.compile(original, dynamic=True)(self, x)


def compiled_module() -> None:
    """The model compiles itself in place, as `model.compile()` does."""
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    original = LlamaForCausalLM.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.compile()

    LlamaForCausalLM.__init__ = init
