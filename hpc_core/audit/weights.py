"""Facts of the weights: which layers are quantized and how, their bytes, and the dtypes of everything else."""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.audit.facts import dtype_name, names, taken
from hpc_core.builders.quantization import packing_for, packing_of
from hpc_core.case.case import Case, FinetuneSpec, QuantSpec
from hpc_core.instruments.owners import owned_bytes
from hpc_core.record.record import Fact

__all__ = ["int4_bytes", "linear_layers", "quantized_bytes", "weight_facts"]

_BLOCK = 64
"""Weights that share a constant in 4 bits: bitsandbytes' default, which transformers leaves alone."""
_NESTED_BLOCK = 256
"""Constants that share a constant when they are quantized again."""
_TILE = {"tile_packed_to_4d": (8, 1024), "opaque": (1, 1)}
"""Rows and columns to whose multiples torchao pads a weight before it packs it."""


def weight_facts(case: Case, model: Any, notes: list[str]) -> dict[str, Fact]:
    """Quantization and dtypes of the live model, against the case."""
    assert case.model is not None
    asked = case.model.dtype
    if isinstance(case.workload, FinetuneSpec) and case.workload.prepare:
        asked = "float32"  # what `prepare_model_for_kbit_training` casts everything unquantized to
    facts = taken(
        {
            "quantized_layers": lambda: _quantized_count(case, model),
            "embedding_dtype": lambda: _one_dtype(asked, model.get_input_embeddings()),
            "norm_dtype": lambda: Fact(asked=[asked], seen=_norm_dtypes(model)),
            "head_dtype": lambda: _one_dtype(asked, model.get_output_embeddings()),
        },
        notes,
    )
    if case.quantization is not None:
        facts |= _quantization_facts(case.quantization, model, notes)
    return facts


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Every linear layer of the base model, quantized or not, under the name it had before an adapter wrapped it."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    }


def _quantization_facts(spec: QuantSpec, model: torch.nn.Module, notes: list[str]) -> dict[str, Fact]:
    layers: list[Any] = [layer for layer in linear_layers(model).values() if _kind(layer) is not None]
    if spec.kind == "int4":
        return _int4_facts(spec, layers, notes)
    looks = {
        "quantization": lambda: Fact(asked=[spec.kind], seen=sorted({str(_kind(layer)) for layer in layers})),
        "quantized_bytes": lambda: Fact(
            asked=sum(quantized_bytes(spec, layer.in_features, layer.out_features) for layer in layers),
            # By layer: one table of codes that all layers share counts in each of them, in the closed form too.
            seen=sum(owned_bytes(_stored(layer)) for layer in layers),
        ),
    }
    if spec.kind != "int8":  # int8 products have one compute dtype, and no attribute that says it
        looks["compute_dtype"] = lambda: Fact(
            asked=[spec.compute_dtype], seen=names(layer.compute_dtype for layer in layers)
        )
        looks["double_quantization"] = lambda: Fact(
            asked=[spec.double_quant], seen=sorted({bool(_state(layer).nested) for layer in layers})
        )
    return taken(looks, notes)


def _int4_facts(spec: QuantSpec, layers: list[Any], notes: list[str]) -> dict[str, Fact]:
    weights = [layer.weight for layer in layers]

    def asked_bytes() -> int:
        return sum(
            int4_bytes(spec, layer.in_features, layer.out_features, str(packing_of(layer.weight))) for layer in layers
        )

    return taken(
        {
            "quantization": lambda: Fact(asked=[spec.kind], seen=sorted({str(_kind(layer)) for layer in layers})),
            "packing": lambda: Fact(
                asked=sorted({packing_for(weight.device) for weight in weights}),
                seen=sorted({str(packing_of(weight)) for weight in weights}),
            ),
            "group_size": lambda: Fact(
                asked=[spec.group_size], seen=sorted({int(weight.block_size[-1]) for weight in weights})
            ),
            "compute_dtype": lambda: Fact(
                asked=[spec.compute_dtype], seen=names(weight.scale_and_zero.dtype for weight in weights)
            ),
            "quantized_bytes": lambda: Fact(
                asked=asked_bytes(), seen=sum(owned_bytes(_stored(layer)) for layer in layers)
            ),
        },
        notes,
    )


def _quantized_count(case: Case, model: torch.nn.Module) -> Fact:
    """By count if all is well; a mismatch names the first layer that is not as it should be."""
    spec, every = case.quantization, linear_layers(model)
    wanted = [name for name in every if spec is not None and name.rpartition(".")[2] not in spec.skip_modules]
    asked = _count_of_shape(case, len(wanted))
    seen = [name for name, layer in every.items() if _kind(layer) is not None]
    odd = [name for name in every if (name in wanted) != (name in seen)]
    if odd:
        state = "is quantized" if odd[0] in seen else "is not"
        return Fact(asked=asked, seen=f"{len(seen)}; {odd[0]} {state}")
    return Fact(asked=asked, seen=len(seen))


def _count_of_shape(case: Case, otherwise: int) -> int:
    """Linear layers to be quantized: by the named shape, or as counted where weights bring a shape of their own."""
    assert case.model is not None
    if case.quantization is None:
        return 0
    shape = case.model.sizes
    if shape is None:
        return otherwise
    skipped = case.quantization.skip_modules
    in_a_layer = [name for name in shape.linear_shapes() if name not in skipped]
    return len(in_a_layer) * shape.num_hidden_layers + ("lm_head" not in skipped)


def _kind(layer: Any) -> str | None:
    """nf4, fp4, int8 or int4 by what the layer computes with; None for a plain layer, words for a quantized class with plain weights."""
    if packing_of(layer.weight) is not None:
        return "int4"
    classes = {parent.__name__ for parent in type(layer).__mro__}
    if "Linear4bit" in classes:
        state = _state(layer)
        return f"{dtype_name(layer.weight.dtype)} in Linear4bit" if state is None else str(state.quant_type)
    if "Linear8bitLt" in classes:
        stored = layer.weight.dtype
        return "int8" if stored == torch.int8 else f"{dtype_name(stored)} in Linear8bitLt"
    return None


def _state(layer: Any) -> Any:
    state = getattr(layer.weight, "quant_state", None)
    return getattr(layer, "quant_state", None) if state is None else state


def _stored(layer: Any) -> list[torch.Tensor]:
    """The tensors that hold a quantized layer's weights: the packed values and every constant."""
    if packing_of(layer.weight) is not None:
        return [layer.weight.qdata, layer.weight.scale_and_zero]
    held = [layer.weight]
    # int8: the constants move from the weight to the layer's state in the first forward.
    for owner in (layer.weight, getattr(layer, "state", None)):
        held += [getattr(owner, name, None) for name in ("CB", "SCB")]
    state = _state(layer)
    while state is not None:
        held += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        state = getattr(state, "state2", None)  # double quantization
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def quantized_bytes(spec: QuantSpec, in_features: int, out_features: int) -> int:
    """Bytes that bitsandbytes stores for one quantized layer without bias, in closed form.

    int8: one byte a weight and a float32 a row. 4-bit: half a byte a weight, a table of 16 float32, and a float32 for each
    block of 64; with double quantization these are bytes, and there is a float32 for every 256 of them, one for their
    mean, and a table of 256.
    """
    weights = in_features * out_features
    if spec.kind == "int8":
        return weights + 4 * out_features
    blocks = -(-weights // _BLOCK)
    packed = -(-weights // 2) + 16 * 4
    if not spec.double_quant:
        return packed + 4 * blocks
    return packed + blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 + 256 * 4


def int4_bytes(spec: QuantSpec, in_features: int, out_features: int, packing: str) -> int:
    """Bytes that torchao stores for one int4 layer without bias, in closed form: half a byte a weight, and for each group of a row a
    scale and a zero in bfloat16. Tile-packed weights are padded to whole tiles first (`Int4TilePackedTo4dTensor.from_hp`).
    """
    row_tile, column_tile = _TILE[packing]
    rows, columns = -(-out_features // row_tile) * row_tile, -(-in_features // column_tile) * column_tile
    return rows * columns // 2 + 2 * 2 * rows * (columns // spec.group_size)


def _one_dtype(asked: str, module: Any) -> Fact | None:
    """The dtype of this module's weight; no fact for a quantized one, or for a model without such a module."""
    module = getattr(module, "base_layer", module)
    if module is None or _kind(module) is not None:
        return None
    return Fact(asked=asked, seen=dtype_name(module.weight.dtype))


def _norm_dtypes(model: torch.nn.Module) -> list[str]:
    weights = [getattr(module, "weight", None) for module in model.modules() if "norm" in type(module).__name__.lower()]
    return names(weight.dtype for weight in weights if isinstance(weight, torch.Tensor))
