"""Faults in what generation does: work that the cache should save, memory moved for nothing."""

from __future__ import annotations

import inspect
import time
from typing import Any

from hpc_core.faults.fault import Call, fault

_SLEEP_S = 0.005
_FORWARD = "transformers.models.llama.modeling_llama:LlamaForCausalLM.forward"


@fault(
    "cache-off",
    "every token computes the whole prompt again",
    on="generate-bf16",
    shows_in=("cache", "flops"),
    predicted=("flops",),  # with few layers decode memory changes too, with many it does not
    patch="transformers:GenerationMixin.generate",
)
def cache_off(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Generate without a cache."""
    return original(*args, **(kwargs | {"use_cache": False}))


@fault(
    "autograd-on",
    "every token records a graph for a backward pass, which holds its activations",
    on="generate-bf16",
    shows_in=("autograd", "peak_decode_bytes"),
    predicted=("peak_decode_bytes", "peak_bytes"),
    patch="transformers:GenerationMixin.generate",
)
def autograd_on(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Generate without the `no_grad` that the method is decorated with."""
    return inspect.unwrap(original)(*args, **kwargs)


@fault(
    "cache-copied",
    "the cache is copied at every token",
    on="generate-bf16",
    shows_in=("operators",),
    patch="transformers.cache_utils:DynamicLayer.update",
)
def cache_copied(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Return copies of keys and values."""
    keys, values = original(*args, **kwargs)
    return keys.clone(), values.clone()


@fault(
    "logits-whole-prompt",
    "prefill computes logits for every prompt token",
    on="generate-bf16",
    shows_in=("flops_prefill", "peak_prefill_bytes"),
    predicted=("peak_prefill_bytes", "peak_bytes"),
    patch=_FORWARD,
)
def logits_whole_prompt(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Keep the logits of every position, not only of the last one."""
    return original(*args, **(kwargs | {"logits_to_keep": 0}))


@fault(
    "decode-sleep",
    "the host sleeps 5 ms at every token",
    on="generate-bf16",
    shows_in=("waits", "decode_token_s", "query_s"),
    needs="--jobs 1",
    patch=_FORWARD,
)
def decode_sleep(original: Call, *args: Any, **kwargs: Any) -> Any:
    """Sleep before each forward. Nothing more is computed, allocated or launched."""
    time.sleep(_SLEEP_S)
    return original(*args, **kwargs)
