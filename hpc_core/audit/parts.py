"""The parts of a model that facts are about, found by transformers' own classes: names of modules differ between architectures."""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.case.errors import library


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """Return the decoder layers of the language model: what gradient checkpointing recomputes. Empty if the model has none."""
    layers = library("transformers", "Finding decoder layers").modeling_layers.GradientCheckpointingLayer
    decoder: torch.nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
    inner = [module for module in decoder.modules() if isinstance(module, layers)]
    if inner:
        return inner
    whole = {*(getattr(model, "_no_split_modules", None) or ())}
    return [module for module in decoder.modules() if type(module).__name__ in whole]


def attention_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the modules that compute attention, outermost ones only. transformers ends the names of their classes in "Attention"."""
    found: dict[str, torch.nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if not inside and any(kind.__name__.endswith("Attention") for kind in type(module).__mro__):
            found[name] = module
    return list(found.values())


def expert_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the modules that hold all experts of a layer, by name. transformers ends the names of their classes in "Experts"."""
    return {name: module for name, module in model.named_modules() if type(module).__name__.endswith("Experts")}
