"""torch.compile of each decoder layer: masks and positions are made outside, so one layer's code serves all.

A step is captured only after compilation has settled: `settled` turns a recompilation into an error with its reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

_LIMIT = 64
"""Compilations of one layer's code. Layers share them, but the first one's input has no gradient, and adapters are guarded by layer."""
_LIMIT_OF_ALL = 256
"""torch's own limit for all compilations of one piece of code."""


def room_for_shapes() -> None:
    """Allow more compilations of a function than torch's eight: batches as wide as their longest row have many shapes."""
    import torch._dynamo  # takes a second, so import it only where it is needed

    torch._dynamo.config.recompile_limit = max(_LIMIT, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(
        _LIMIT_OF_ALL, torch._dynamo.config.accumulated_recompile_limit
    )


def compile_layers(layers: Any) -> None:
    """Compile each layer, for its shapes and as a whole. Nothing is compiled before its first call."""
    room_for_shapes()
    for layer in layers:
        layer.compile(fullgraph=True, dynamic=False)


def compiled_layers(layers: Any) -> int:
    """Return how many of these layers run compiled."""
    return sum(getattr(layer, "_compiled_call_impl", None) is not None for layer in layers)


@contextlib.contextmanager
def settled(*, compiled: bool) -> Iterator[None]:
    """Make a recompilation in the block an error; torch's message names the guard that failed."""
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("fail_on_recompile"):
        yield
