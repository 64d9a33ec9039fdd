"""Faults in what the host does: Python that runs more, calls that cost more, objects that stay."""

from __future__ import annotations

import copy
import json
from typing import Any

from hpc_core.faults.fault import Call, fault

_CAUSAL = "transformers.models.llama.modeling_llama:LlamaForCausalLM.forward"
_LAYER = "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward"
_UPDATE = "transformers.generation.utils:GenerationMixin._update_model_kwargs_for_generation"
_TURNS = 500
_kept: list[Any] = []


@fault(
    "layer-spin",
    "every layer runs a Python loop of 500 turns",
    on="generate-bf16",
    shows_in=("bytecodes", "bytecodes_decode"),
    predicted=("bytecodes", "bytecodes_decode"),
    patch=_LAYER,
)
def layer_spin(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Count to 500 before each layer."""
    for _ in range(_TURNS):
        pass
    return original(*args, **kwargs)


@fault(
    "config-copied",
    "every token copies the generation config",
    on="generate-bf16",
    shows_in=("bytecodes_decode", "python_calls_decode"),
    predicted=("bytecodes_decode", "python_calls_decode"),
    patch=_UPDATE,
)
def config_copied(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Copy the configuration before each token's inputs are made."""
    copy.deepcopy(self.generation_config)
    return original(self, *args, **kwargs)


@fault(
    "weights-looked-up",
    "every token looks every parameter up by its name",
    on="generate-bf16",
    shows_in=("bytecodes_decode", "python_calls_decode"),
    predicted=("bytecodes_decode", "python_calls_decode"),
    patch=_UPDATE,
)
def weights_looked_up(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Walk all modules for the model's dtype, as `next(model.parameters())` does not."""
    dict(self.named_parameters())
    return original(self, *args, **kwargs)


@fault(
    "c-calls",
    "every layer asks a tensor a thousand times for its dimensions",
    on="generate-bf16",
    shows_in=("c_calls", "c_calls_decode"),
    predicted=("c_calls", "c_calls_decode"),
    patch=_LAYER,
)
def c_calls(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Call into C a thousand times from one line."""
    for value in (args[1],) * 1000:
        value.dim()
    return original(*args, **kwargs)


@fault(
    "states-kept",
    "every query leaves a list of tensors behind",
    on="generate-bf16",
    shows_in=("kept_objects", "at_peak_other_bytes", "peak_bytes"),
    patch=_CAUSAL,
)
def states_kept(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Keep a small list for each forward, as a cache without a bound does."""
    _kept.append([len(_kept)])
    return original(*args, **kwargs)


@fault(
    "cache-emptied",
    "every forward empties the allocator's cache",
    on="generate-bf16",
    shows_in=("device_frees", "device_allocations"),
    seen_on="gpu",
    patch=_CAUSAL,
)
def cache_emptied(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Free what the allocator caches, so that the next layers allocate it again."""
    import torch

    torch.cuda.empty_cache()
    return original(*args, **kwargs)


@fault(
    "step-logged",
    "every optimizer step formats all hyperparameters as text",
    on="lora",
    shows_in=("bytecodes", "python_calls"),
    predicted=("bytecodes", "python_calls"),
    patch="torch.optim:AdamW.step",
)
def step_logged(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Write the optimizer's groups as JSON, with the sizes of all their tensors."""
    groups = [{**group, "params": [list(each.shape) for each in group["params"]]} for group in self.param_groups]
    json.dumps(groups, default=str, indent=1)
    return original(self, *args, **kwargs)


@fault(
    "norms-in-python",
    "every step adds up the sizes of all parameters in Python",
    on="lora",
    shows_in=("bytecodes",),
    predicted=("bytecodes",),
    patch="torch.optim:Optimizer.zero_grad",
)
def norms_in_python(original: Call, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Multiply every parameter's shape by hand."""
    total = 0
    for group in self.param_groups:
        for each in group["params"]:
            count = 1
            for size in each.shape:
                count *= size
            total += count
    return original(self, *args, **kwargs)
