"""Quantize a model in place, through bitsandbytes or torchao.

bitsandbytes: the result equals that of `from_pretrained(quantization_config=…)`. transformers' quantizer replaces the linear layers,
we give each one its weight, and the quantizer finishes.

int4 by torchao: on a GPU `Int4WeightOnlyConfig` packs for torch's tinygemm kernels ("tile_packed_to_4d"). A CPU cannot use that packing;
it has kernels for another one ("opaque", a prototype in torchao) with the same codes, scales and zeros. A record names its packing.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.case.errors import BuildError, library
from hpc_core.case.parts import QuantSpec


def bitsandbytes_config(spec: QuantSpec) -> Any:
    """Return transformers' BitsAndBytesConfig of `spec`.

    Raises:
        MissingLibraryError: bitsandbytes is not installed.
    """
    library("bitsandbytes", f"Quantization to {spec.kind}")
    transformers = library("transformers", "Quantization")
    skip = list(spec.skip_modules)
    if spec.kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.kind,
        bnb_4bit_compute_dtype=getattr(torch, spec.compute_dtype),
        bnb_4bit_use_double_quant=spec.double_quant,
        llm_int8_skip_modules=skip,
    )


def quantize(model: torch.nn.Module, spec: QuantSpec, device: torch.device) -> None:
    """Replace every linear layer except `spec.skip_modules` by a quantized one, one at a time, on `device`.

    A model that was quantized while loading is only checked and kept portable.

    Raises:
        BuildError: a layer that should be quantized is not, no layer is, or int4 has no kernel for the device or a layer's width.
        MissingLibraryError: bitsandbytes, or for int4 torchao, is not installed.
    """
    if spec.kind == "int4":
        quantize_to_int4(model, spec, device)
    elif not quantized_layers(model):  # weights from folder and hub are quantized already, random and GGUF ones are not
        _quantize_in_place(model, spec, device)
    layers = quantized_layers(model)
    if not layers:
        skipped = ", ".join(spec.skip_modules) or "nothing"
        raise BuildError(
            f"{spec.kind} quantized nothing: the model has no linear layer that it can quantize, apart from skip_modules ({skipped}). Use "
            "nf4, fp4 or int8 for a model with Conv1D layers, or remove the quantization."
        )
    left = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and packing_of(module.weight) is None
        and name.rpartition(".")[2] not in spec.skip_modules
    ]
    if left:
        raise BuildError(
            f"Quantization to {spec.kind} left {len(left)} of {len(left) + len(layers)} linear layers as they were, first {left[:1]}."
        )
    for layer in layers.values():
        _keep_portable(layer)


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return a model's quantized linear layers by name: bitsandbytes' layers, or plain ones with weights packed by torchao."""
    packed = packed_layers(model)
    if packed:
        return packed  # a case has one kind of quantization, and bitsandbytes may not be installed
    bnb = library("bitsandbytes", "Quantization")
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized_weight(layer: Any) -> torch.Tensor:
    """Return the dequantized weight of a layer, (out_features, in_features), in the dtype that its library gives."""
    if packing_of(layer.weight) is not None:
        return dequantized_int4(layer)
    bnb = library("bitsandbytes", "Reading quantized weights")
    if isinstance(layer, bnb.nn.Linear4bit):
        weight: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight
    # The first forward moves the constants from the weight to the layer's state.
    rows = layer.state.CB if layer.state.CB is not None else layer.weight.CB
    constants = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    scaled: torch.Tensor = rows.float() * constants.float().view(-1, 1) / 127  # the largest code of a row is 127
    return scaled


def is_conv1d(module: torch.nn.Module) -> bool:
    """Return whether this is transformers' Conv1D (GPT-2): a linear layer whose weight is (in_features, out_features)."""
    return type(module).__name__ == "Conv1D"


def _quantize_in_place(model: Any, spec: QuantSpec, device: torch.device) -> None:
    quantizers = library("transformers.quantizers", "Quantization")
    quantizer = quantizers.AutoHfQuantizer.from_config(bitsandbytes_config(spec), pre_quantized=False)
    plain = {
        name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear or is_conv1d(module)
    }
    quantizer.preprocess_model(model=model, device_map={"": device}, dtype=getattr(model, "dtype", None))
    for name in list(plain):
        module = model.get_submodule(name)
        source = plain.pop(name)
        if module is source:
            continue  # one of skip_modules
        rows = source.weight.data.T.contiguous() if is_conv1d(source) else source.weight.data
        weight = _int8(rows) if spec.kind == "int8" else _four_bit(rows, module)
        module.weight = weight.to(device) if spec.kind != "int8" else weight
        if source.bias is not None:
            module.bias = source.bias  # it requires gradients, as after from_pretrained
        module.train(source.training)
        del source, rows  # free the unquantized weight before the next one is quantized
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _four_bit(weight: torch.Tensor, module: Any) -> Any:
    bnb = library("bitsandbytes", "Quantization")
    # The new layer's placeholder contains every option (type, block size, double quantization), as in transformers' loader.
    return bnb.nn.Params4bit(weight, requires_grad=False, **module.weight.__dict__)


def _int8(weight: torch.Tensor) -> Any:
    # What Int8Params does when it moves from CPU to GPU, but without the move: 3B parameters would cross the bus twice.
    bnb = library("bitsandbytes", "Quantization")
    rows, constants, _ = bnb.functional.int8_vectorwise_quant(weight.contiguous().to(torch.float16))
    return bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=constants)


def _keep_portable(layer: Any) -> None:
    """Keep 4-bit weights in the layout that every CPU and every backward pass can read.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a Linear4bit in its first forward without gradients, and reads the new layout
    in inference only: a later training step gives zero or wrong gradients. This per-layer flag of bitsandbytes prevents the repacking.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False


PACKINGS = {"Int4TilePackedTo4dTensor": "tile_packed_to_4d", "Int4OpaqueTensor": "opaque"}
"""torchao's name of the packing, by the class of packed weights."""
_LEAST_CAPABILITY = (8, 0)
"""tinygemm's kernels need bfloat16 tensor cores."""
_CPU_GROUPS = (32, 64, 128)
_AT_ONCE = 1024
"""Columns that are dequantized at a time. Their unit vectors take (1024, columns) in bfloat16: 17 MB at 8192 columns."""


def packing_for(device: torch.device) -> str:
    """Return the packing that this device's kernels read."""
    return "tile_packed_to_4d" if device.type == "cuda" else "opaque"


def packing_of(weight: Any) -> str | None:
    """Return the int4 packing of a weight; None for any other weight. Compares class names, so torchao need not be installed."""
    return PACKINGS.get(type(weight).__name__)


def packed_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the linear layers with int4 weights, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and packing_of(module.weight) is not None
    }


def quantize_to_int4(model: torch.nn.Module, spec: QuantSpec, device: torch.device) -> None:
    """Pack every linear layer except `spec.skip_modules` in place, freeing each plain weight before the next one is packed.

    Raises:
        BuildError: the device has no int4 kernels, or a layer's rows cannot be divided into groups.
        MissingLibraryError: torchao is not installed.
    """
    config = _config(spec, device)
    wanted = {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] not in spec.skip_modules
    }
    for name, module in wanted.items():  # torchao only logs that it leaves such a layer as it is
        if module.in_features % spec.group_size:
            raise BuildError(
                f"int4 in groups of {spec.group_size}: {name} has rows of {module.in_features} weights, which is not a multiple of the group. "
                "Use a smaller group_size, or add the layer to skip_modules."
            )
    names = set(wanted)
    del wanted  # keep no reference to a layer while its weight is replaced
    torchao = library("torchao.quantization", "Quantization to int4")
    with torch.no_grad():
        torchao.quantize_(model, config, filter_fn=lambda _, name: name in names)


def _config(spec: QuantSpec, device: torch.device) -> Any:
    # set_inductor_config would change torch.compile's options for the whole process.
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            raise BuildError(
                f"int4's kernels need a GPU of compute capability 8.0 (A100) or newer, this one has {'.'.join(map(str, capability))}: "
                "use nf4."
            )
        torchao = library("torchao.quantization", "Quantization to int4")
        return torchao.Int4WeightOnlyConfig(
            group_size=spec.group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    if device.type != "cpu":
        raise BuildError(f"int4 supports CUDA GPUs and CPUs, not {device.type}: use one of them.")
    if spec.group_size not in _CPU_GROUPS:
        raise BuildError(
            f"A CPU has int4 kernels for groups of {', '.join(map(str, _CPU_GROUPS))} weights, not of {spec.group_size}: "
            "use one of these, or run on a GPU."
        )
    prototype = library("torchao.prototype.quantization.int4", "int4 on a CPU")
    return prototype.PrototypeInt4WeightOnlyConfig(group_size=spec.group_size, set_inductor_config=False)


def dequantized_int4(layer: Any) -> torch.Tensor:
    """Return the weight that the kernel multiplies with, (out_features, in_features) in bfloat16: its products with unit vectors.

    A sum of one term does not round, so these are the values that the kernel decodes. The audit's fact `weights` compares them with the
    weights that were drawn.
    """
    rows, columns, device = int(layer.out_features), int(layer.in_features), layer.weight.device
    whole = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        for start in range(0, columns, _AT_ONCE):
            count = min(_AT_ONCE, columns - start)
            units = torch.zeros(count, columns, dtype=torch.bfloat16, device=device)
            units[:, start : start + count].fill_diagonal_(1.0)
            whole[:, start : start + count] = torch.nn.functional.linear(units, layer.weight).T
    return whole
