"""Faults in what generation does: work that the cache should save, memory moved for nothing."""

from __future__ import annotations

import inspect
import time
from typing import Any

from hpc_core.builders.libraries import library
from hpc_core.faults.fault import Injection
from hpc_core.faults.replacing import replace

_SLEEP_S = 0.005


def cache_off(injection: Injection) -> None:
    """`generate` is told to keep no cache."""
    transformers: Any = library("transformers", "This fault")

    def make(original: Any) -> Any:
        def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **(kwargs | {"use_cache": False} if injection.hit() else kwargs))

        return generate

    replace(transformers.GenerationMixin, "generate", make)


def cache_copied(injection: Injection) -> None:
    """The cache hands out copies of its keys and values."""
    caches: Any = library("transformers.cache_utils", "This fault")

    def make(original: Any) -> Any:
        def update(self: Any, *args: Any, **kwargs: Any) -> Any:
            keys, values = original(self, *args, **kwargs)
            return (keys.clone(), values.clone()) if injection.hit() else (keys, values)

        return update

    replace(caches.DynamicLayer, "update", make)


def logits_whole_prompt(injection: Injection) -> None:
    """The model forgets that only the last position's logits are wanted."""
    llama: Any = library("transformers.models.llama.modeling_llama", "This fault")

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return original(self, *args, **(kwargs | {"logits_to_keep": 0} if injection.hit() else kwargs))

        # generate asks the signature which arguments a model takes.
        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return forward

    replace(llama.LlamaForCausalLM, "forward", make)


def decode_sleep(injection: Injection) -> None:
    """The host sleeps before each forward: nothing more is computed, allocated or launched."""
    llama: Any = library("transformers.models.llama.modeling_llama", "This fault")

    def make(original: Any) -> Any:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if injection.hit():
                time.sleep(_SLEEP_S)
            return original(self, *args, **kwargs)

        forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        return forward

    replace(llama.LlamaForCausalLM, "forward", make)
