"""The tensors that an adapter adds to a linear layer, in closed form.

Expected bytes, the least FLOPs of a training step and the audit of trainable parameters all read them here. Every tensor is
trainable and stored in `adapter.dtype`. `hpc_core.builders.adapter` builds them. Source: peft's LoRA (`peft.tuners.lora.layer`).
"""

from __future__ import annotations

import math

from hpc_core.case.parts import AdapterSpec
from hpc_core.case.shapes import Shape


def has_closed_form(shape: Shape, adapter: AdapterSpec) -> bool:
    """Return whether it is plain LoRA on the seven linear layers of a decoder layer, whose sizes the shape gives."""
    return adapter.is_plain and set(adapter.targets or ()) <= set(shape.linear_shapes())


def layer_tensors(adapter: AdapterSpec, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor added to one layer of (out_features, in_features) = (rows, columns), by peft's name."""
    return {"lora_A": (adapter.rank, columns), "lora_B": (rows, adapter.rank)}


def layer_parameters(adapter: AdapterSpec, rows: int, columns: int) -> int:
    """Return how many numbers the tensors of one layer have."""
    return sum(map(math.prod, layer_tensors(adapter, rows, columns).values()))


def tensor_sizes(adapter: AdapterSpec, shape: Shape) -> list[int]:
    """Return the numbers in each tensor of the adapter, over all layers of the model.

    Raises:
        KeyError: a target is not one of the seven linear layers.
    """
    linear = shape.linear_shapes()
    layer = [
        math.prod(size) for name in adapter.targets or () for size in layer_tensors(adapter, *linear[name]).values()
    ]
    return layer * shape.num_hidden_layers


def layer_train_flops(adapter: AdapterSpec, rows: int, columns: int, tokens: int, *, input_gradient: bool) -> int:
    """Return the FLOPs that the adapter of one layer adds to a training step over `tokens` tokens.

    Both low-rank products run once forward and twice backward, for the gradients of input and weight. Without
    `input_gradient` the first product needs no gradient of its input: nothing before the layer is trained.
    """
    down, up = 2 * tokens * adapter.rank * columns, 2 * tokens * adapter.rank * rows
    return 3 * (down + up) - (0 if input_gradient else down)
