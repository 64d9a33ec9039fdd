"""The reference path: a model turned, layer by layer, into the same weights dequantized, in float32, with eager attention.

Also what that takes, and what there is: on a GPU the reference runs only where it fits beside nothing else.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import torch

from hpc_core.builders.quantization import dequantized_weight, packed_layers, quantized_layers
from hpc_core.instruments.owners import owned_bytes, weight_tensors

__all__ = ["full_float32", "reference_bytes", "room_bytes", "turn_into_reference"]

_FLOAT32 = 4
_LOGITS_HELD = 5
"""Float32 copies of the checked logits at once: both paths', both without padding, and their difference."""
_SCORES_HELD = 3
"""Copies of one layer's attention scores that eager attention holds at once: scores, masked, softmax."""


def turn_into_reference(model: Any) -> None:
    """Dequantize every quantized layer, cast everything to float32, and take eager attention. One layer at a time."""
    layers = _quantized(model)
    for name in list(layers):
        # Popped, so that the quantized layer is gone before the next one is converted.
        model.set_submodule(name, _dequantized(layers.pop(name)))
    for parameter in (*model.parameters(), *model.buffers()):
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    model.config._attn_implementation = "eager"  # the switch that each attention reads at every call


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 in float32: tfloat32, should the code under test have allowed it, would err like bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def reference_bytes(model: Any, rows: int, width: int) -> int:
    """What the reference of `model` takes beyond what the model holds now, over (rows, width) ids.

    Four bytes a parameter in place of what it takes now, the largest one twice while it is converted; logits; one layer's
    attention scores and hidden states.
    """
    grown, largest = 0, 0
    layers = _quantized(model)
    inside = {id(tensor) for layer in layers.values() for tensor in (*layer.parameters(), *layer.buffers())}
    for layer in layers.values():
        numbers = int(layer.in_features) * int(layer.out_features)
        grown += _FLOAT32 * numbers - owned_bytes(weight_tensors(layer)["weights"])
        largest = max(largest, numbers)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in inside:
            grown += (_FLOAT32 - tensor.element_size()) * tensor.numel()
            largest = max(largest, tensor.numel())
    config = model.config.get_text_config()
    hidden = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    logits = _LOGITS_HELD * rows * width * int(config.vocab_size)
    scores = _SCORES_HELD * rows * int(config.num_attention_heads) * width**2
    states = rows * width * (4 * inner + 8 * hidden)
    return grown + _FLOAT32 * (largest + logits + scores + states)


def room_bytes(device: torch.device) -> int:
    """What the card still has: free for anyone, or reserved by this process and not in use."""
    gc.collect()
    torch.cuda.empty_cache()  # reserved memory in pieces too small for a float32 layer goes back first
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _quantized(model: Any) -> dict[str, Any]:
    if getattr(model, "is_quantized", False) or _has_quantized(model):
        return dict(quantized_layers(model))
    return {}  # without importing bitsandbytes


def _has_quantized(model: torch.nn.Module) -> bool:
    if packed_layers(model):
        return True
    return any(
        "Linear4bit" in type(module).__name__ or "Linear8bitLt" in type(module).__name__ for module in model.modules()
    )


def _dequantized(layer: Any) -> torch.nn.Linear:
    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(dequantized_weight(layer).float(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = torch.nn.Parameter(layer.bias.data.float(), requires_grad=False)
    return plain
