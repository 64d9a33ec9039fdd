"""Factories of callable cases for test_modules.py: each patches transformers for the rest of the process."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Step = Callable[[], None]


def _llama() -> Any:
    import transformers.models.llama.modeling_llama as llama

    return llama


def class_forward() -> Step:
    """Replace the forward of every MLP by a wrapper that `functools.wraps` makes look like the original."""
    mlp = _llama().LlamaMLP
    original = mlp.forward

    @functools.wraps(original)
    def forward(self: Any, x: Any) -> Any:
        return original(self, x)

    mlp.forward = forward
    return lambda: None


def function() -> Step:
    """Replace the function that applies the rotary embedding, as Liger does."""
    llama = _llama()
    original = llama.apply_rotary_pos_emb
    llama.apply_rotary_pos_emb = lambda *args, **kwargs: original(*args, **kwargs)
    return lambda: None


def whole_class() -> Step:
    """Replace the norm's class for every model built from now on."""
    llama = _llama()
    llama.LlamaRMSNorm = type("OurRMSNorm", (llama.LlamaRMSNorm,), {"__module__": __name__})
    return lambda: None
