"""Gradient (activation) checkpointing through transformers' own switch. Knows nothing of how much it saves."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["enable_checkpointing"]


def enable_checkpointing(model: torch.nn.Module, kind: str, *, frozen_inputs: bool) -> None:
    """Turn checkpointing of every decoder layer on, "reentrant" or "non-reentrant"; "off" leaves the model alone.

    The reentrant kind only builds a graph when its inputs need gradients. Where the embeddings are frozen
    (`frozen_inputs`, any adapter) they are made to, as peft does.
    """
    if kind == "off":
        return
    hugging: Any = model
    reentrant = kind == "reentrant"
    # transformers 5.24 has a new name for this call and warns; this is the only one that 5.17 knows too.
    hugging.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant and frozen_inputs:
        hugging.enable_input_require_grads()
