"""The parts of a model that facts are about, found by transformers' own classes: names of modules differ between architectures."""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.case.errors import library
from hpc_core.instruments.owners import adapter_names
from hpc_core.instruments.places import path_of
from hpc_core.record.findings import Findings


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


def beside_text(model: Any) -> list[str]:
    """Return the names of a multimodal model's parts that text alone never runs: towers for pictures and sound, and projectors."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return []
    decoder = model.get_decoder()
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    around = path.rpartition(".")[0]
    siblings = model.get_submodule(around).named_children()
    head = model.get_output_embeddings()
    prefix = f"{around}." if around else ""
    return [f"{prefix}{name}" for name, module in siblings if module is not decoder and module is not head]


def text_note(model: Any) -> Findings:
    """Return a note that a multimodal model is measured as text, with what never runs and which adapters never train."""
    beside = beside_text(model)
    if not beside:
        return Findings()
    idle = sum(part.numel() for name in beside for part in model.get_submodule(name).parameters())
    adapters = sum(name.startswith(tuple(f"{each}." for each in beside)) for name in adapter_names(model))
    untrained = f", and {adapters} adapter tensors on them never train" if adapters else ""
    parts = " and ".join(path_of(name) for name in beside)
    kind = model.config.model_type
    return Findings(
        notes=(f"{kind} is multimodal and is measured as text: {parts} ({idle:,} parameters) never run{untrained}",)
    )
