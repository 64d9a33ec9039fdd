"""Bytes of a case's weights, adapter, gradients, optimizer state and KV cache, in closed form.

Only named shapes have a closed form: the case does not give the sizes of weights from a folder, hub or GGUF file.
Sources: the layouts of bitsandbytes 0.50 (`functional.QuantState`, `optim.optimizer`), torchao 0.18 (`Int4TilePackedTo4dTensor`),
torch's AdamW, peft's LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from hpc_core.bounds.adapter import has_closed_form, tensor_sizes
from hpc_core.case.case import Case
from hpc_core.case.errors import DataError
from hpc_core.case.lengths import recorded_lengths
from hpc_core.case.parts import QuantSpec
from hpc_core.case.shapes import Shape
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one number."""
_BLOCK = 64
"""4-bit weights per block. Each block has one constant (bitsandbytes' default for nf4 and fp4)."""
_DOUBLE_BLOCK = 256
"""With double quantization, block constants that share a second constant."""
_CODE_4BIT = 16 * 4
"""A layer's table of 16 values, float32."""
_DOUBLE_EXTRA = 256 * 4 + 4
"""With double quantization, a layer's table of 256 values and the offset, float32."""
_INT4_TILE = (8, 1024)
"""torchao pads the rows and columns of an int4 weight to multiples of these on a GPU. A CPU pads nothing."""
_SCALE_AND_ZERO = 2 * 2
"""Bytes of scale and zero point of a group of int4 weights, in bfloat16."""
_OPTIMIZER_BLOCK = 256
"""State values per constant in bitsandbytes' 8-bit optimizers."""
_MIN_8BIT = 4096
"""bitsandbytes keeps a float32 state for smaller parameters (`min_8bit_size`)."""
_ROTARY_TABLES = 2
"""`inv_freq` and transformers' copy of it, float32, half a head wide each."""


def shape_of(case: Case) -> Shape | None:
    """Return the case's named shape; None if its weights define the shape, and for callables."""
    return None if case.model is None else case.model.sizes


def expected_bytes(case: Case) -> dict[str, int]:
    """Return bytes by metric name: weights, adapter, gradients, optimizer, KV cache.

    `kv_cache_bytes` is the cache of the longest prompt after its last token. Entries without a closed form are left out: a quantized
    head, an adapter on other modules than the seven linear layers, and int4 in widths that a GPU pads and a CPU does not.
    """
    shape = shape_of(case)
    if shape is None or case.model is None:
        return {}
    found: dict[str, int] = {}
    weights = _weights(shape, WIDTHS[case.model.dtype], case)
    if weights is not None:
        found["weights_bytes"] = weights
    if isinstance(case.workload, FinetuneSpec):
        found |= _training(shape, case, case.workload)
    elif isinstance(case.workload, GenerateSpec):
        lengths = prompt_lengths(case.workload)
        if lengths and case.workload.cache != "off":
            held = max(lengths) + case.workload.new_tokens - 1  # the last token is never fed back
            found["kv_cache_bytes"] = case.workload.batch * held * kv_bytes_per_token(shape, case.model.dtype)
    return found


def unexplained_bytes(case: Case, measured: Mapping[str, int], *, cached_tokens: int | None = None) -> dict[str, int]:
    """Return measured minus expected bytes, by category that has a closed form.

    `cached_tokens` is the tokens per row in the measured cache; None if no cache was measured.
    """
    expected = {name: value for name, value in expected_bytes(case).items() if name != "kv_cache_bytes"}
    shape = shape_of(case)
    if cached_tokens is not None and shape is not None and case.model is not None:
        assert isinstance(case.workload, GenerateSpec)
        held = case.workload.batch * cached_tokens
        expected["kv_cache_bytes"] = held * kv_bytes_per_token(shape, case.model.dtype)
    return {name: measured.get(name, 0) - value for name, value in expected.items()}


def _weights(shape: Shape, width: int, case: Case) -> int | None:
    rotary = _ROTARY_TABLES * (shape.head_dim // 2) * 4
    quantization = case.quantization
    if quantization is None:
        return shape.parameter_count() * width + rotary
    if "lm_head" not in quantization.skip_modules:
        return None
    layers = [size for name, size in shape.linear_shapes().items() if name not in quantization.skip_modules]
    if quantization.kind == "int4" and any(rows % _INT4_TILE[0] or columns % _INT4_TILE[1] for rows, columns in layers):
        return None
    plain = shape.parameter_count() - shape.num_hidden_layers * sum(rows * columns for rows, columns in layers)
    if isinstance(case.workload, FinetuneSpec) and case.workload.prepare:
        width = 4  # prepare casts to float32 whatever is not quantized
    quantized = shape.num_hidden_layers * sum(_quantized(rows, columns, quantization) for rows, columns in layers)
    return quantized + plain * width + rotary


def _quantized(rows: int, columns: int, spec: QuantSpec) -> int:
    """Return the bytes of one quantized linear layer with its constants."""
    if spec.kind == "int8":
        return rows * columns + 4 * rows
    if spec.kind == "int4":
        return rows * columns // 2 + _SCALE_AND_ZERO * rows * columns // spec.group_size
    packed, blocks = ceil(rows * columns / 2), ceil(rows * columns / _BLOCK)
    if not spec.double_quant:
        return packed + 4 * blocks + _CODE_4BIT
    return packed + blocks + 4 * ceil(blocks / _DOUBLE_BLOCK) + _DOUBLE_EXTRA + _CODE_4BIT


def _training(shape: Shape, case: Case, workload: FinetuneSpec) -> dict[str, int]:
    assert case.model is not None
    found: dict[str, int] = {}
    adapter = case.adapter
    if adapter is None:
        sizes, width = _parameter_sizes(shape), WIDTHS[case.model.dtype]
    elif has_closed_form(shape, adapter):
        sizes, width = tensor_sizes(adapter, shape), WIDTHS[adapter.dtype]
        found["adapter_weights_bytes"] = sum(sizes) * width
    else:
        return found
    # Bytes that exist at once: an optimizer in the backward pass frees each gradient before the next layer's is made.
    found["gradient_bytes"] = 0 if workload.optimizer_in_backward else sum(sizes) * width
    found["optimizer_bytes"] = _optimizer(sizes, width, workload.optimizer)
    return found


def _parameter_sizes(shape: Shape) -> list[int]:
    """Return the numbers in each parameter tensor of the model. A tied head counts once."""
    linear = shape.linear_shapes()
    layer = [rows * columns for rows, columns in linear.values()] + [shape.hidden_size] * 2
    if shape.attention_bias:
        layer += [linear[name][0] for name in ("q_proj", "k_proj", "v_proj")]
    embeddings = [shape.vocab_size * shape.hidden_size] * (1 if shape.tie_word_embeddings else 2)
    return layer * shape.num_hidden_layers + embeddings + [shape.hidden_size]


def _optimizer(sizes: list[int], width: int, optimizer: str) -> int:
    """Return the bytes of AdamW's two moments: by torch in the parameter's dtype with a step count, by bitsandbytes in 8 bits with constants."""
    if "8bit" not in optimizer:
        return sum(2 * size * width + 4 for size in sizes)
    tables = 2 * 256 * 4 if any(size >= _MIN_8BIT for size in sizes) else 0  # shared by all parameters
    small = sum(2 * 4 * size for size in sizes if size < _MIN_8BIT)
    large = sum(2 * (size + 4 * ceil(size / _OPTIMIZER_BLOCK)) for size in sizes if size >= _MIN_8BIT)
    return tables + small + large


def kv_bytes_per_token(shape: Shape, dtype: str) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * WIDTHS[dtype]


def embedding_bytes(shape: Shape, dtype: str) -> int:
    """Return the bytes of the embedding table."""
    return shape.vocab_size * shape.hidden_size * WIDTHS[dtype]


def prompt_lengths(workload: GenerateSpec) -> tuple[int, ...]:
    """Return the tokens of each prompt; empty if texts decide the lengths."""
    count = workload.batch * workload.prompts
    if workload.prompt_length is not None:
        return (workload.prompt_length,) * count
    if workload.data.source != "trace" or workload.data.name is None:
        return ()
    try:
        return recorded_lengths(workload.data.name)[:count]
    except DataError:
        return ()
