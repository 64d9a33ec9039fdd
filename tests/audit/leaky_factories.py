"""Factories that test_audit_modules names in its cases: each changes transformers for the whole process and leaves it so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Step = Callable[[], None]


def _llama() -> Any:
    import transformers.models.llama.modeling_llama as llama

    return llama


def class_forward() -> Step:
    """Every MLP runs a forward of ours from now on, disguised as the original by `functools.wraps`."""
    mlp = _llama().LlamaMLP
    original = mlp.forward

    @functools.wraps(original)
    def forward(self: Any, x: Any) -> Any:
        return original(self, x)

    mlp.forward = forward
    return lambda: None


def function() -> Step:
    """The rotary embedding is applied by a function of ours, as Liger does."""
    llama = _llama()
    original = llama.apply_rotary_pos_emb
    llama.apply_rotary_pos_emb = lambda *args, **kwargs: original(*args, **kwargs)
    return lambda: None


def whole_class() -> Step:
    """The file's norm is a class of ours, which every model built from now on takes."""
    llama = _llama()
    llama.LlamaRMSNorm = type("OurRMSNorm", (llama.LlamaRMSNorm,), {"__module__": __name__})
    return lambda: None
