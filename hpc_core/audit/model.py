"""Facts of the model: quantized layers, weights, dtypes, and whose code it runs.

`weights` compares every matrix of the live model with the same matrix drawn again from the case's seed. It needs no stored
reference and does not depend on machine or version: the same library draws both on the same device in the same process.

`modules_own` finds patches. Libraries such as Liger replace forwards and functions of transformers for the whole process.
Cases that run in their own process are safe from that; for cases that share one (`inline`), this fact reports it.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

from hpc_core.builders.adapter import attached
from hpc_core.builders.causal_lm import STD, drawn, torch_dtype
from hpc_core.builders.quantization import dequantized_weight, packing_for, packing_of, quantized_layers
from hpc_core.case.case import Case
from hpc_core.case.parts import ModelSpec, QuantSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.instruments.owners import adapter_names, base_name, base_prefix, owned_bytes
from hpc_core.instruments.places import path_of
from hpc_core.record.findings import Findings, checked
from hpc_core.record.record import Fact

_BLOCK = 64
"""Weights per constant in 4 bits: bitsandbytes' default, which transformers does not change."""
_NESTED_BLOCK = 256
"""Constants per second-level constant in double quantization."""
_TILE = {"tile_packed_to_4d": (8, 1024), "opaque": (1, 1)}
"""torchao pads a weight to multiples of these rows and columns before it packs it."""


def weight_facts(case: Case, model: Any) -> Findings:
    """Compare quantization and dtypes of the live model with the case."""
    assert case.model is not None
    asked = case.model.dtype
    if isinstance(case.workload, FinetuneSpec) and case.workload.prepare:
        asked = "float32"  # `prepare_model_for_kbit_training` casts everything that is not quantized
    facts = checked(
        {
            "quantized_layers": lambda: _quantized_count(case, model),
            "embedding_dtype": lambda: _one_dtype(asked, model.get_input_embeddings()),
            "norm_dtype": lambda: Fact(asked=[asked], seen=_norm_dtypes(model)),
            "head_dtype": lambda: _one_dtype(asked, model.get_output_embeddings()),
            "weight_layout": lambda: _layout(model),
        },
    )
    if case.quantization is not None:
        facts |= _quantization_facts(case.quantization, model)
    return facts


def context_note(model: Any, tokens: int) -> Findings:
    """Return a note if a row of `tokens` tokens has more positions than the model supports.

    The case still runs: memory, time and counts are correct, but answers at those positions mean little.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or tokens <= most:
        return Findings()
    return Findings(
        notes=(f"rows of {tokens:,} tokens are longer than the model's context of {most:,} (max_position_embeddings)",)
    )


def linear_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """Return every linear layer of the base model, quantized or not, by its name without an adapter's wrapper."""
    added = adapter_names(model)
    return {
        name.removesuffix(".base_layer").removesuffix(".original_module"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" not in added
    }


def _quantization_facts(spec: QuantSpec, model: torch.nn.Module) -> Findings:
    layers: list[Any] = [layer for layer in linear_layers(model).values() if _kind(layer) is not None]
    share = checked({"quantized_share": lambda: _quantized_share(spec, model)})
    if spec.kind == "int4":
        return share | _int4_facts(spec, layers)
    checks = {
        "quantization": lambda: Fact(asked=[spec.kind], seen=sorted({str(_kind(layer)) for layer in layers})),
        "quantized_bytes": lambda: Fact(
            asked=sum(quantized_bytes(spec, layer.in_features, layer.out_features) for layer in layers),
            # Per layer: the closed form counts a code table that all layers share once per layer, too.
            seen=sum(owned_bytes(_stored(layer)) for layer in layers),
        ),
    }
    if spec.kind != "int8":  # int8 products have only one compute dtype, and no attribute names it
        checks["compute_dtype"] = lambda: Fact(
            asked=[spec.compute_dtype], seen=names(layer.compute_dtype for layer in layers)
        )
        checks["double_quantization"] = lambda: Fact(
            asked=[spec.double_quant], seen=sorted({bool(_state(layer).nested) for layer in layers})
        )
    return share | checked(checks)


_LEFT = 0.01
"""A share of a model's matrices that may stay as it is: routers and short convolutions, which libraries leave alone."""
_LISTED = 3


def _quantized_share(spec: QuantSpec, model: torch.nn.Module) -> Fact:
    """Return whether nearly all weights in matrices are quantized. Libraries replace linear layers and silently leave all else.

    Embeddings, and what the case skips, are not quantized on purpose.
    """
    quantized = sum(
        layer.in_features * layer.out_features for layer in linear_layers(model).values() if _kind(layer) is not None
    )
    left: Counter[str] = Counter()
    for name, parameter in _plain_matrices(model):
        if not {*name.split(".")} & {*spec.skip_modules}:
            left[path_of(name.removesuffix(".weight"))] += parameter.numel()
    share = left.total() / max(left.total() + quantized, 1)
    if share <= _LEFT:
        return Fact(asked="all", seen="all")
    most = [path for path, _ in left.most_common()]
    more = ", …" if len(most) > _LISTED else ""
    return Fact(
        asked="all",
        seen=f"{share:.0%} of the matrix weights are not quantized: ".replace("%", " %")
        + ", ".join(most[:_LISTED])
        + more,
    )


def _plain_matrices(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the base model's matrices that are neither quantized nor embeddings."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    packed = {id(layer.weight) for layer in linear_layers(model).values() if _kind(layer) is not None}
    added = adapter_names(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name not in added and id(parameter) not in tables | packed:
            yield name, parameter


def _int4_facts(spec: QuantSpec, layers: list[Any]) -> Findings:
    weights = [layer.weight for layer in layers]

    def asked_bytes() -> int:
        return sum(
            int4_bytes(spec, layer.in_features, layer.out_features, str(packing_of(layer.weight))) for layer in layers
        )

    return checked(
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
    )


def _quantized_count(case: Case, model: torch.nn.Module) -> Fact:
    """Return the count of quantized layers; a mismatch names the first wrong layer."""
    spec, every = case.quantization, linear_layers(model)
    wanted = [name for name in every if spec is not None and name.rpartition(".")[2] not in spec.skip_modules]
    expected = _count_of_shape(case, len(wanted))
    quantized = [name for name, layer in every.items() if _kind(layer) is not None]
    wrong = [name for name in every if (name in wanted) != (name in quantized)]
    if wrong:
        state = "is quantized" if wrong[0] in quantized else "is not"
        return Fact(asked=expected, seen=f"{len(quantized)}; {wrong[0]} {state}")
    return Fact(asked=expected, seen=len(quantized))


def _count_of_shape(case: Case, otherwise: int) -> int:
    """Return how many linear layers the named shape quantizes; `otherwise` if the case's weights define the shape."""
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
    """Return nf4, fp4, int8 or int4 by the layer's live data, and None for a plain layer.

    A layer of a quantized class whose weights are plain gets a description instead.
    """
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
    """Return the tensors that hold a quantized layer's weights: the packed values and every constant."""
    if packing_of(layer.weight) is not None:
        return [layer.weight.qdata, layer.weight.scale_and_zero]
    held = [layer.weight]
    # int8: the first forward moves the constants from the weight to the layer's state.
    for owner in (layer.weight, getattr(layer, "state", None)):
        held += [getattr(owner, name, None) for name in ("CB", "SCB")]
    state = _state(layer)
    while state is not None:
        held += [getattr(state, name, None) for name in ("absmax", "code", "offset")]
        state = getattr(state, "state2", None)  # double quantization
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]


def quantized_bytes(spec: QuantSpec, in_features: int, out_features: int) -> int:
    """Return the bytes that bitsandbytes stores for one quantized layer without bias, in closed form.

    int8: one byte per weight and a float32 per row. 4-bit: half a byte per weight, a table of 16 float32 codes, and a float32
    constant per block of 64. Double quantization stores one byte per constant instead, a float32 per 256 constants, a float32
    for their mean, and a table of 256 codes.
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
    """Return the bytes that torchao stores for one int4 layer without bias, in closed form.

    Half a byte per weight, and a bfloat16 scale and zero point for each group of a row. Tile-packed weights are padded to whole
    tiles first (`Int4TilePackedTo4dTensor.from_hp`).
    """
    row_tile, column_tile = _TILE[packing]
    rows, columns = -(-out_features // row_tile) * row_tile, -(-in_features // column_tile) * column_tile
    return rows * columns // 2 + 2 * 2 * rows * (columns // spec.group_size)


def _one_dtype(asked: str, module: Any) -> Fact | None:
    """Compare the dtype of this module's weight; no fact if the weight is quantized or the model has no such module."""
    module = getattr(module, "base_layer", module)
    if module is None or _kind(module) is not None:
        return None
    return Fact(asked=asked, seen=dtype_name(module.weight.dtype))


def _layout(model: torch.nn.Module) -> Fact:
    """Return whether every unquantized weight is contiguous: kernels and their speed depend on it, counts and bytes do not."""
    packed = {id(layer.weight) for layer in linear_layers(model).values() if _kind(layer) is not None}
    odd = [
        f"{name} with strides {part.stride()}"
        for name, part in model.named_parameters()
        if id(part) not in packed and not part.is_contiguous()
    ]
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return Fact(asked="row by row", seen=f"{odd[0]}{more}" if odd else "row by row")


def _norm_dtypes(model: torch.nn.Module) -> list[str]:
    weights = [getattr(module, "weight", None) for module in model.modules() if "norm" in type(module).__name__.lower()]
    return names(weight.dtype for weight in weights if isinstance(weight, torch.Tensor))


_QUANTIZED = 0.3
"""Largest relative error from quantization: fp4 has 0.15, nf4 0.09, int4 0.10, int8 0.01. Wrong weights have 1.41, the square root of 2."""
_TRAINED = 0.3
"""Largest relative error from training, if the weights themselves are trained."""
_MORE_STEPS = 50
"""Steps beyond the timed ones: warm-up, memory, counters."""
_CHUNK = 1 << 24
"""Elements compared at a time: their difference is the only copy, 64 MiB in float32."""


def value_facts(case: Case, model: torch.nn.Module) -> Findings:
    """Return whether every matrix of random weights holds the values drawn for it; no fact for weights read from files."""
    return checked({"weights": lambda: _weights(case, model)})


def _weights(case: Case, model: torch.nn.Module) -> Fact | None:
    spec = case.model
    assert spec is not None
    allowed = _allowed(case)
    if not spec.drawn or allowed is None or attached(model).rewrote:
        return None
    asked = f"as drawn by seed {spec.seed}"
    wrong = []
    tied = _tied(spec, model)
    for name, live in _matrices(case, model).items():
        # A tied head is the embedding table; a head that is quantized separately began as a copy of it.
        source = "model.embed_tokens.weight" if tied and name == "lm_head.weight" else name
        off = min(_error(live, source, dtype, spec.seed) for dtype in live.drawn_in(torch_dtype(spec.dtype)))
        if not off <= max(allowed, _QUANTIZED if live.quantized else 0.0):  # NaN is not within anything
            wrong.append(f"{name} is off by {off:.2g} of its size")
    if not wrong:
        return Fact(asked=asked, seen=asked)
    return Fact(asked=asked, seen=wrong[0] + (f", {len(wrong) - 1} more with it" if len(wrong) > 1 else ""))


def _tied(spec: ModelSpec, model: Any) -> bool:
    return model.config.tie_word_embeddings if spec.sizes is None else spec.sizes.tie_word_embeddings


def _allowed(case: Case) -> float | None:
    """Return how far the base weights may be from the drawn ones; None if training may have moved them arbitrarily far."""
    if case.adapter is not None or not isinstance(case.workload, FinetuneSpec):
        return 0.0  # frozen: bitwise equal
    # Adam moves a weight by at most about the learning rate per step.
    moved = case.workload.learning_rate * (case.workload.steps + _MORE_STEPS) / STD
    return _TRAINED if moved <= _TRAINED else None


class _Live:
    """One matrix of the live model. It is dequantized only during the comparison."""

    def __init__(self, holder: Any, *, quantized: bool):
        self._holder = holder
        self.quantized = quantized

    def value(self) -> torch.Tensor:
        """Return the weight as it was drawn: a Conv1D's, which is quantized by columns, by rows again."""
        if not self.quantized:
            value: torch.Tensor = self._holder.detach()
            return value
        weight = dequantized_weight(self._holder)
        turned = getattr(self._holder, "source_cls", None)  # transformers' quantizer keeps the class that it replaced
        return weight.T if turned is not None and turned.__name__ == "Conv1D" else weight

    def drawn_in(self, dtype: torch.dtype) -> set[torch.dtype]:
        """Return the dtypes in which it may have been drawn: the model's, or its own where transformers keeps it in float32."""
        return {dtype} if self.quantized else {dtype, self._holder.dtype}


def _matrices(case: Case, model: torch.nn.Module) -> dict[str, _Live]:
    """Return the base model's matrices by their names without an adapter's wrappers."""
    layers = quantized_layers(model) if case.quantization is not None else {}
    packed = {f"{name}.weight" for name in layers}
    found = {f"{name}.weight": _Live(layer, quantized=True) for name, layer in layers.items()}
    added, prefix = adapter_names(model), base_prefix(model)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and name not in added and name not in packed:
            found[name] = _Live(parameter, quantized=False)
    return {base_name(name, prefix): live for name, live in found.items()}


def _error(live: _Live, name: str, dtype: torch.dtype, seed: int) -> float:
    """Return |live - drawn| / |drawn| without a float32 copy of the whole matrix."""
    actual = live.value()
    with torch.no_grad():
        reference = drawn(name, tuple(actual.shape), dtype, actual.device, seed)
        if torch.equal(actual, reference):  # frozen weights, read once; NaN equals nothing
            return 0.0
        parts = zip(actual.reshape(-1).split(_CHUNK), reference.reshape(-1).split(_CHUNK), strict=True)
        norms = [torch.stack([_norm(a - b), _norm(b)]) for a, b in parts]
        off, size = torch.stack(norms).double().square().sum(dim=0).tolist()
    return float((off / size) ** 0.5)


def _norm(part: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(part, dtype=torch.float32)
    return norm


_OWN = frozenset({"torch", "transformers", "peft", "bitsandbytes", "accelerate", "kernels"})
"""Packages whose code every case may run; `kernels` only provides decorators to transformers."""
_SHOWN = 3


def module_facts(model: torch.nn.Module, *, also: Iterable[str] = ()) -> Findings:
    """Return whether no other package replaced a forward of the model, or a function or class of the files that define it.

    `also` names further packages whose code the case may run: its engine's, or that of an injected fault.
    """
    own = _OWN.union(also)

    def modules_own() -> Fact:
        foreign = sorted({*_foreign_forwards(model, own), *_foreign_names(model, own)})
        more = f" and {len(foreign) - _SHOWN} more" if len(foreign) > _SHOWN else ""
        return Fact(asked="all", seen="all but " + ", ".join(foreign[:_SHOWN]) + more if foreign else "all")

    return checked({"modules_own": modules_own})


def _foreign_forwards(model: torch.nn.Module, own: frozenset[str]) -> Iterator[str]:
    """Yield forwards, of instances and of classes, that another package defined."""
    for module in model.modules():
        kind = type(module)
        on_instance = vars(module).get("forward")
        forward = kind.forward if on_instance is None else on_instance
        for origin in _origins(forward):
            if origin.partition(".")[0] not in own:
                yield f"{kind.__name__}.forward from {origin}"


def _foreign_names(model: torch.nn.Module, own: frozenset[str]) -> Iterator[str]:
    """Yield functions and classes that the model's source files define and another package replaced."""
    names = {kind.__module__ for module in model.modules() for kind in [type(module)]}
    for name in sorted(names):
        if not name.startswith("transformers.models."):
            continue
        module = sys.modules[name]
        for defined in _defined(module):
            value = vars(module).get(defined)
            origins = [value.__module__] if isinstance(value, type) else _origins(value)
            for origin in origins:
                if origin.partition(".")[0] not in own:
                    yield f"{name.rpartition('.')[2]}.{defined} from {origin}"


@functools.cache
def _defined(module: ModuleType) -> tuple[str, ...]:
    """Return the names that this module's file defines, whatever they are bound to now."""
    tree = ast.parse(inspect.getsource(module))
    return tuple(node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef))


def _origins(function: Any) -> list[str]:
    """Return the modules that define a function and everything that it wraps.

    Uses the globals of the code, because `functools.wraps` copies `__module__` but not those.
    """
    found = []
    while function is not None:
        if isinstance(function, functools.partial):
            function = function.func
            continue
        function = getattr(function, "__func__", function)  # of a bound method
        written = function.__globals__.get("__name__") if isinstance(function, FunctionType) else None
        found.append(str(written or getattr(function, "__module__", None) or type(function).__module__))
        function = getattr(function, "__wrapped__", None)
    return found


def dtype_name(dtype: torch.dtype | None) -> str:
    """Return the name that specifications use, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def names(dtypes: Iterable[torch.dtype | None]) -> list[str]:
    """Return the distinct names, sorted."""
    return sorted({dtype_name(dtype) for dtype in dtypes})
