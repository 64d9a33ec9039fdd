"""The least cost of a training step, a prefill and a decoded token, in closed form: FLOPs, and bytes of device memory.

FLOPs are counted as torch's FlopCounterMode does: 2 per multiply-add, attention scores not halved for the causal mask.
Recomputation by gradient checkpointing is left out, because it is not necessary.

A `Floor` is a lower bound, so everything doubtful is left out: attention counts the causal half and no recomputed scores, weights are
read once, and what fits into the L2 cache is not read again. Padding counts, because the case asks for it.
"""

from __future__ import annotations

import msgspec

from hpc_core.bounds.adapter import has_closed_form, layer_train_flops
from hpc_core.bounds.footprint import (
    embedding_bytes,
    expected_bytes,
    kv_bytes_per_token,
    prompt_lengths,
    shape_of,
)
from hpc_core.case.case import Case
from hpc_core.case.parts import AdapterSpec
from hpc_core.case.shapes import Shape
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.gpus import Gpu

_STAGE = {"q_proj": 0, "k_proj": 0, "v_proj": 0, "o_proj": 1, "gate_proj": 2, "up_proj": 2, "down_proj": 3}
"""The order of the linear layers in a decoder layer. Attention lies between 0 and 1."""


def forward_flops(shape: Shape, batch: int, length: int, *, past: int = 0, logits: int | None = None) -> int:
    """Return the FLOPs of one forward over `length` new tokens per row after `past` cached ones.

    The head is applied to `logits` positions per row, by default to all. Source: the matrix products of the decoder,
    2·m·n·k each; attention has 2 products of (length x head_dim x (past + length)) per head.
    """
    tokens = batch * length
    linear = sum(rows * columns for rows, columns in shape.linear_shapes().values()) * shape.num_hidden_layers
    head = shape.vocab_size * shape.hidden_size * batch * (length if logits is None else logits)
    width = shape.num_attention_heads * shape.head_dim
    attention = 2 * batch * length * (past + length) * width * shape.num_hidden_layers
    return 2 * (linear * tokens + head + attention)


def train_flops(shape: Shape, batch: int, length: int, adapter: AdapterSpec | None) -> int:
    """Return the FLOPs of one training step without recomputation.

    Full: every product runs once forward and twice backward (input and weight gradients). With an adapter, the frozen weights
    have no weight gradient, nothing in the first layer up to its first adapter needs an input gradient, and the
    adapter's products are added. Attention's backward has five products where forward has two (flash attention
    recomputes the scores; FlopCounterMode counts it).

    Raises:
        KeyError: a target is not one of the seven linear layers of a decoder layer.
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
    reached = min(_STAGE[name] for name in adapter.targets or ())
    spared = [name for name in shapes if _STAGE[name] <= reached]  # in the first layer their input needs no gradient
    total += forward - 2 * tokens * sum(shapes[name][0] * shapes[name][1] for name in spared)
    if reached > 0:
        total -= attention * 5 // 2 // shape.num_hidden_layers
    for name in adapter.targets or ():
        rows, columns = shapes[name]
        inner = layer_train_flops(adapter, rows, columns, tokens, input_gradient=True)
        first = layer_train_flops(adapter, rows, columns, tokens, input_gradient=name not in spared)
        total += first + inner * (shape.num_hidden_layers - 1)
    return total


def decode_bytes(weights_bytes: int, embedding_bytes: int, tied: bool, cache_bytes: int) -> int:
    """Return the bytes that one decoded token must read from device memory: every weight once, and the whole KV cache.

    Only one row of an untied embedding is read, so its table does not count. A tied one is also the head and counts.
    """
    return weights_bytes - (0 if tied else embedding_bytes) + cache_bytes


def int8_head_bytes(shape: Shape) -> int:
    """Return the bytes of a head in int8: one per weight, and a float32 scale per row."""
    return shape.vocab_size * (shape.hidden_size + 4)


_TRAIN_PASSES = 4
"""How often a training step may find what it needs in the L2 cache: forward, backward, gradients, optimizer."""
_ATTENTION_NEEDED = (1 / 2) * (6 / 7)
"""The necessary share of the counted attention products: the causal half, and four of the five products in the backward pass."""


class Floor(msgspec.Struct, frozen=True, kw_only=True):
    """The least work of one unit: FLOPs, and bytes of device memory read or written."""

    flops: float
    bytes: float
    passes: int = 1
    """How often the L2 cache can save reading its own size."""

    def seconds(self, sheet: Gpu, rate: float) -> float:
        """Return the longer of compute and memory time, as if they overlapped perfectly. `rate` is in FLOP/s."""
        return max(self.flops / rate, self.memory_bytes(sheet) / sheet.bytes_per_s)

    def memory_bytes(self, sheet: Gpu) -> float:
        """Return the bytes that miss the L2 cache whatever it holds."""
        return max(0.0, self.bytes - self.passes * sheet.l2_bytes)


def compute_dtypes(case: Case) -> tuple[str, ...]:
    """Return the dtypes in which the case's products may run. float32 may run as tfloat32, if torch is set so."""
    if case.model is None:
        return ()
    found = {case.model.dtype}
    if isinstance(case.workload, FinetuneSpec) and case.workload.precision == "autocast-bf16":
        found.add("bfloat16")
    if case.quantization is not None:
        found.add(case.quantization.compute_dtype)
        if case.quantization.kind == "int8":
            return ("int8", *sorted(found))
    return tuple(sorted("tfloat32" if dtype == "float32" else dtype for dtype in found))


def peak_rate(case: Case, sheet: Gpu) -> tuple[str, float] | None:
    """Return the fastest of the case's dtypes on this GPU and its FLOP/s; None for a callable."""
    rates = {dtype: sheet.flop_per_s[dtype] for dtype in compute_dtypes(case) if dtype in sheet.flop_per_s}
    return max(rates.items(), key=lambda item: item[1]) if rates else None


def train_floor(case: Case, positions: float | None = None) -> Floor | None:
    """Return the floor of a training step over `positions` tokens, padding included (default: full rows); None without a closed form."""
    shape, workload, adapter = shape_of(case), case.workload, case.adapter
    if shape is None or not isinstance(workload, FinetuneSpec):
        return None
    if adapter is not None and not has_closed_form(shape, adapter):
        return None
    if positions is None:
        positions = workload.batch * workload.length
    # train_flops is a·length + b·length² for one row.
    one, two = train_flops(shape, 1, 1, adapter), train_flops(shape, 1, 2, adapter)
    quadratic = (two - 2 * one) / 2
    length = 0 if workload.padding == "longest" else workload.length  # rows of unknown widths: attention left out
    flops = positions * (one - quadratic + quadratic * length * _ATTENTION_NEEDED)
    # An optimizer inside the backward pass moves as many bytes, although its gradients never exist at once.
    after = msgspec.structs.replace(workload, optimizer_in_backward=False)
    held = expected_bytes(msgspec.structs.replace(case, workload=after))
    read = held.get("weights_bytes", 0) + held.get("adapter_weights_bytes", 0) - _unread_embedding(shape, case)
    # Gradients are written and read, parameters read and written, moments read and written.
    updated = 4 * held.get("gradient_bytes", 0) + 2 * held.get("optimizer_bytes", 0)
    return Floor(flops=flops, bytes=max(0, read) + updated, passes=_TRAIN_PASSES)


def prefill_floor(case: Case) -> Floor | None:
    """Return the floor of the forward over the shortest prompt, with one logit per row; None without a closed form."""
    shape, workload = shape_of(case), case.workload
    weights = expected_bytes(case).get("weights_bytes")
    if shape is None or weights is None or not isinstance(workload, GenerateSpec):
        return None
    length = min(prompt_lengths(workload), default=1)
    attention = 4 * workload.batch * length**2 * shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    flops = forward_flops(shape, workload.batch, length, logits=1) - attention / 2
    return Floor(flops=flops, bytes=weights - _unread_embedding(shape, case))


def decode_floor(case: Case) -> Floor | None:
    """Return the floor of one more token after the shortest prompt: every weight once, and the cache. None without a closed form."""
    shape, workload = shape_of(case), case.workload
    weights = expected_bytes(case).get("weights_bytes")
    if shape is None or weights is None or case.model is None or not isinstance(workload, GenerateSpec):
        return None
    past = min(prompt_lengths(workload), default=1)
    cache = 0 if workload.cache == "off" else workload.batch * past * kv_bytes_per_token(shape, case.model.dtype)
    head = embedding_bytes(shape, case.model.dtype)
    read = decode_bytes(weights, head, shape.tie_word_embeddings, cache)
    if workload.head == "int8":
        read -= head - int8_head_bytes(shape)
    return Floor(flops=forward_flops(shape, workload.batch, 1, past=past), bytes=read)


def _unread_embedding(shape: Shape, case: Case) -> int:
    """Return the bytes of an untied embedding, of which only the tokens' rows are read."""
    if shape.tie_word_embeddings or case.model is None:
        return 0
    return embedding_bytes(shape, case.model.dtype)
