"""Look at what really runs: how often each decoder layer's attention is entered, and which KV cache is filled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CacheSeen", "LayerForwards", "checkpointing_seen", "count_layer_forwards", "watch_cache"]


@dataclass
class LayerForwards:
    """Layers watched, and the forwards seen in them."""

    layers: int = 0
    count: int = 0


@contextlib.contextmanager
def count_layer_forwards(model: torch.nn.Module) -> Iterator[LayerForwards]:
    """Count forwards of every module whose name ends in `self_attn` while the block runs.

    The attention inside a layer is entered again when the layer is recomputed, whichever kind of checkpointing does it;
    the layer's own hooks may not be.
    """
    seen = LayerForwards()

    def entered(*_: object) -> None:
        seen.count += 1

    handles = []
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            seen.layers += 1
            handles.append(module.register_forward_pre_hook(entered))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def checkpointing_seen(forwards: int, layers: int, steps: int) -> str:
    """Say "off" for one forward a layer and step, "on" for two, a sentence for anything else."""
    per_step = layers * steps
    if layers == 0:
        return "unknown: no layer is called self_attn"
    if forwards == per_step:
        return "off"
    if forwards == 2 * per_step:
        return "on"
    return f"partly: {forwards} forwards of {layers} layers in {steps} steps"


@dataclass
class CacheSeen:
    """The KV cache that the model was last called with; None before the first call and where none is used."""

    seen: Any = None


@contextlib.contextmanager
def watch_cache(model: torch.nn.Module) -> Iterator[CacheSeen]:
    """Note the cache object that `generate` hands to the model, whatever the argument is called in this version."""
    cache = CacheSeen()

    def called(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        cache.seen = next(
            (value for value in arguments.values() if hasattr(value, "layers") and hasattr(value, "get_seq_length")),
            None,
        )

    handle = model.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield cache
    finally:
        handle.remove()
