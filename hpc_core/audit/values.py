"""The fact `weights`: whether the live base weights hold what the case's seed says, each under its own name.

Every matrix is drawn again, alone, and compared. It needs no stored number, so nothing of it depends on machine or version:
both sides come from the same library on the same device in the same process.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.audit.facts import taken
from hpc_core.builders.causal_lm import torch_dtype
from hpc_core.builders.drawn import STD, drawn
from hpc_core.builders.quantization import dequantized_weight, quantized_layers
from hpc_core.case.case import Case, FinetuneSpec, ModelSpec
from hpc_core.record.record import Fact

__all__ = ["value_facts"]

_QUANTIZED = 0.3
"""Relative error that quantization may have: fp4 has 0.15, nf4 0.09, int4 0.10, int8 0.01. Wrong weights have 1.41, the square root of 2."""
_TRAINED = 0.3
"""Relative error that a training run may have added, where the weights themselves are trained."""
_MORE_STEPS = 50
"""Steps beyond the timed ones: warm-up, memory, counters."""
_CHUNK = 1 << 24
"""Elements compared at a time: their difference is the only copy, 64 MiB in float32."""
_WRAPPERS = ("base_model.model.", ".base_layer")
"""What peft adds to a name."""


def value_facts(case: Case, model: torch.nn.Module, notes: list[str]) -> dict[str, Fact]:
    """Whether every matrix of random weights holds what was drawn for it; nothing for weights that are read."""
    return taken({"weights": lambda: _weights(case, model)}, notes)


def _weights(case: Case, model: torch.nn.Module) -> Fact | None:
    spec = case.model
    assert spec is not None
    allowed = _allowed(case)
    if not spec.drawn or allowed is None:
        return None
    asked = f"as drawn by seed {spec.seed}"
    odd = []
    tied = _tied(spec, model)
    for name, live in _matrices(case, model).items():
        # A tied head is the table; one that was quantized on its own began as a copy of it.
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        off = _error(live, source, torch_dtype(spec.dtype), spec.seed)
        if not off <= max(allowed, _QUANTIZED if live.quantized else 0.0):  # NaN is not within anything
            odd.append(f"{name} is off by {off:.2g} of its size")
    if not odd:
        return Fact(asked=asked, seen=asked)
    return Fact(asked=asked, seen=odd[0] + (f", {len(odd) - 1} more with it" if len(odd) > 1 else ""))


def _tied(spec: ModelSpec, model: Any) -> bool:
    return model.config.tie_word_embeddings if spec.sizes is None else spec.sizes.tie_word_embeddings


def _allowed(case: Case) -> float | None:
    """How far the base weights may be from what was drawn; None where training may have moved them anywhere."""
    if case.adapter is not None or not isinstance(case.workload, FinetuneSpec):
        return 0.0  # frozen: bit by bit
    # Adam moves a weight by about the learning rate a step at most.
    moved = case.workload.learning_rate * (case.workload.steps + _MORE_STEPS) / STD
    return _TRAINED if moved <= _TRAINED else None


class _Live:
    """One matrix of the live model, dequantized only while it is compared."""

    def __init__(self, holder: Any, *, quantized: bool):
        self._holder = holder
        self.quantized = quantized

    def value(self) -> torch.Tensor:
        value: torch.Tensor = dequantized_weight(self._holder) if self.quantized else self._holder.detach()
        return value


def _matrices(case: Case, model: torch.nn.Module) -> dict[str, _Live]:
    """The base model's matrices, by the names they had before an adapter wrapped them."""
    layers = quantized_layers(model) if case.quantization is not None else {}
    packed = {f"{name}.weight" for name in layers}
    found = {f"{name}.weight": _Live(layer, quantized=True) for name, layer in layers.items()}
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and ".lora_" not in name and name not in packed:
            found[name] = _Live(parameter, quantized=False)
    return {_plain(name): live for name, live in found.items()}


def _plain(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _error(live: _Live, name: str, dtype: torch.dtype, seed: int) -> float:
    """|live - drawn| / |drawn|, without a float32 copy of the whole."""
    seen = live.value()
    with torch.no_grad():
        reference = drawn(name, tuple(seen.shape), dtype, seen.device, seed)
        if torch.equal(seen, reference):  # frozen weights, read once; NaN equals nothing
            return 0.0
        parts = zip(seen.reshape(-1).split(_CHUNK), reference.reshape(-1).split(_CHUNK), strict=True)
        norms = [torch.stack([_norm(a - b), _norm(b)]) for a, b in parts]
        off, size = torch.stack(norms).double().square().sum(dim=0).tolist()
    return float((off / size) ** 0.5)


def _norm(part: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(part, dtype=torch.float32)
    return norm
