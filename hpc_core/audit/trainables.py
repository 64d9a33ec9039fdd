"""Facts of what trains: how many parameters, which by name, and in which dtype the adapter is stored."""

from __future__ import annotations

import re
from typing import Any

import torch

from hpc_core.audit.facts import names, taken
from hpc_core.audit.weights import linear_layers
from hpc_core.builders.adapter import adapter_parameters
from hpc_core.case.case import AdapterSpec, Case, FinetuneSpec
from hpc_core.record.record import Fact

__all__ = ["trainable_facts"]

_ADAPTER = re.compile(r"(\w+)\.(lora_\w+)\b")
_SHOWN = 8


def trainable_facts(case: Case, model: torch.nn.Module, notes: list[str]) -> dict[str, Fact]:
    """Trainable parameters by count and by name, against the case; nothing may train in a generation."""
    training = isinstance(case.workload, FinetuneSpec)
    adapter = case.adapter
    return taken(
        {
            "trainable_parameters": lambda: Fact(
                asked=_asked_count(case, model) if training else 0,
                seen=sum(part.numel() for part in _live(model).values()),
            ),
            "trainable_names": lambda: _names(case, model) if training else None,
            "adapter_dtype": lambda: (
                None
                if adapter is None or not training  # a generation's is merged: nothing of it is left
                else Fact(asked=[adapter.dtype], seen=names(part.dtype for part in adapter_parameters(model).values()))
            ),
        },
        notes,
    )


def _live(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def _asked_count(case: Case, model: torch.nn.Module) -> int:
    """Closed form: every parameter, or rank x (inputs + outputs) for each layer that the adapter targets."""
    assert case.model is not None
    shape = case.model.sizes
    if case.adapter is None:
        return sum(part.numel() for part in model.parameters()) if shape is None else shape.parameter_count()
    known = {} if shape is None else shape.linear_shapes()
    if shape is not None and set(case.adapter.targets) <= set(known):
        return case.adapter.rank * shape.num_hidden_layers * sum(sum(known[name]) for name in case.adapter.targets)
    return _adapter_count(case.adapter, model)


def _adapter_count(adapter: AdapterSpec, model: torch.nn.Module) -> int:
    """By the linear layers of a model whose shape has no name here.

    Raises:
        LookupError: a target is not a linear layer, so there is no closed form.
    """
    layers: dict[str, list[Any]] = {target: [] for target in adapter.targets}
    for name, layer in linear_layers(model).items():
        layers.get(name.rpartition(".")[2], []).append(layer)
    empty = [target for target, found in layers.items() if not found]
    if empty:
        raise LookupError(f"no linear layer is called {', '.join(empty)}")
    widths: list[int] = [layer.in_features + layer.out_features for found in layers.values() for layer in found]
    return adapter.rank * sum(widths)


def _names(case: Case, model: torch.nn.Module) -> Fact:
    """Full: "all". Adapter: `target.lora_A`, `target.lora_B`, whatever the layer; anything else by its whole name."""
    live = _live(model)
    if case.adapter is None:
        frozen = [name for name, _ in model.named_parameters() if name not in live]
        return Fact(asked="all", seen=f"all but {_few(frozen)}" if frozen else "all")
    asked = sorted(f"{target}.{half}" for target in case.adapter.targets for half in ("lora_A", "lora_B"))
    frozen = [name for name in adapter_parameters(model) if name not in live]
    seen = sorted({_short(name) for name in live})
    if frozen:
        return Fact(asked=asked, seen=f"{len(live)} tensors, but not {_few(frozen)}")
    return Fact(asked=asked, seen=seen if len(seen) <= len(asked) + _SHOWN else _few(seen))


def _short(name: str) -> str:
    found = _ADAPTER.search(name)
    return name if found is None else f"{found[1]}.{found[2]}"


def _few(listed: list[str]) -> str:
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{listed[0]}{more}" if listed else "nothing"
