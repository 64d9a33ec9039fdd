"""What a step must at least cost: FLOPs of its matrix products and bytes that a decoded token must read, in closed form.

Counts as torch's FlopCounterMode does: 2 FLOP a multiply-add, attention scores not halved for the causal mask.
Recomputation by gradient checkpointing is left out: it is a choice, not a need. Knows no torch.
"""

from __future__ import annotations

from hpc_core.case.case import AdapterSpec
from hpc_core.case.shapes import Shape

__all__ = ["decode_bytes", "forward_flops", "int8_head_bytes", "train_flops"]

_STAGE = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
"""In which order a decoder layer's linear layers follow each other; attention lies between 0 and 1."""


def forward_flops(shape: Shape, batch: int, length: int, *, past: int = 0, logits: int | None = None) -> int:
    """FLOPs of one forward over `length` new tokens a row after `past` cached ones.

    `logits`: positions a row that the head is applied to (default all). Source: matrix products of the decoder,
    2·m·n·k each; attention 2 products of (length x head_dim x (past + length)) a head.
    """
    tokens = batch * length
    linear = sum(rows * columns for rows, columns in shape.linear_shapes().values()) * shape.num_hidden_layers
    head = shape.vocab_size * shape.hidden_size * batch * (length if logits is None else logits)
    width = shape.num_attention_heads * shape.head_dim
    attention = 2 * batch * length * (past + length) * width * shape.num_hidden_layers
    return 2 * (linear * tokens + head + attention)


def train_flops(shape: Shape, batch: int, length: int, adapter: AdapterSpec | None) -> int:
    """FLOPs of one training step without recomputation.

    Full: every product once forward, twice backward (input and weight gradients). With an adapter the frozen weights
    have no weight gradient, nothing in the first layer up to its first adapter needs an input gradient, and the
    low-rank products are added. Attention's backward has five products where forward has two (flash attention
    recomputes the scores; FlopCounterMode counts it).

    Raises:
        KeyError: the adapter sits on something other than the seven linear layers of a decoder layer.
    """
    tokens = batch * length
    width = shape.num_attention_heads * shape.head_dim
    attention = 4 * batch * length * length * width * shape.num_hidden_layers
    shapes = shape.linear_shapes()
    layer = 2 * tokens * sum(rows * columns for rows, columns in shapes.values())
    head = 2 * tokens * shape.vocab_size * shape.hidden_size
    forward = layer * shape.num_hidden_layers + head
    total = forward + attention + attention * 5 // 2
    if adapter is None:
        return total + 2 * forward
    reached = min(_STAGE[name] for name in adapter.targets)
    spared = [name for name in shapes if _STAGE[name] <= reached]  # in the first layer they read what takes no gradient
    total += forward - 2 * tokens * sum(shapes[name][0] * shapes[name][1] for name in spared)
    if reached > 0:
        total -= attention * 5 // 2 // shape.num_hidden_layers
    for name in adapter.targets:
        rows, columns = shapes[name]
        down, up = 2 * tokens * adapter.rank * columns, 2 * tokens * adapter.rank * rows
        total += 3 * (down + up) * shape.num_hidden_layers
        if name in spared:
            total -= down
    return total


def decode_bytes(weights_bytes: int, embedding_bytes: int, tied: bool, cache_bytes: int) -> int:
    """Bytes that one decoded token must read from device memory: every weight once, and the whole KV cache.

    Of an untied embedding only one row is read, so its table does not count; a tied one is the head and does.
    """
    return weights_bytes - (0 if tied else embedding_bytes) + cache_bytes


def int8_head_bytes(shape: Shape) -> int:
    """Bytes of a head in int8: one a weight, and a float32 scale a row."""
    return shape.vocab_size * (shape.hidden_size + 4)
