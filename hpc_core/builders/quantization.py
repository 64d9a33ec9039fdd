"""Quantize a model in place: through bitsandbytes' own classes, into what `from_pretrained(quantization_config=…)` gives, or by torchao.

With bitsandbytes the order is transformers' own: its quantizer swaps the linear layers, we hand each one its weight, its quantizer finishes.
Knows nothing of adapters and of measuring.


int4 weights by torchao: which packing a device has, which layers hold it, and the weight that it stands for.

On a GPU torchao's `Int4WeightOnlyConfig` packs for torch's tinygemm kernels ("tile_packed_to_4d"). A CPU cannot make that packing; it has
kernels for one of its own ("opaque", a prototype of torchao's), with the same codes, scales and zeros. A record names the packing it ran.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.builders.libraries import library
from hpc_core.case.errors import BuildError
from hpc_core.case.parts import QuantSpec


def bitsandbytes_config(spec: QuantSpec) -> Any:
    """transformers' BitsAndBytesConfig that says the same as `spec`.

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
    """Replace every linear layer but `spec.skip_modules` by its quantized twin, one at a time, on `device`.

    A model that was quantized while loading is only finished (the guard below) and checked.

    Raises:
        BuildError: a layer that should be quantized is not, or none is; int4 that the device or a layer's width has no kernel for.
        MissingLibraryError: bitsandbytes, or for int4 torchao, is not installed.
    """
    if spec.kind == "int4":
        quantize_to_int4(model, spec, device)
    elif not quantized_layers(model):  # weights from folder and hub come quantized, random and GGUF ones do not
        _quantize_in_place(model, spec, device)
    layers = quantized_layers(model)
    left = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and packing_of(module.weight) is None
        and name.rpartition(".")[2] not in spec.skip_modules
    ]
    if left or not layers:
        raise BuildError(
            f"Quantization to {spec.kind} left {len(left)} of {len(left) + len(layers)} linear layers as they were, first {left[:1]}."
        )
    for layer in layers.values():
        _keep_portable(layer)


def quantized_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A model's linear layers with quantized weights, by name: those of bitsandbytes, or plain ones with weights packed by torchao."""
    packed = packed_layers(model)
    if packed:
        return packed  # a case has one kind of quantization, and bitsandbytes may not be there
    bnb = library("bitsandbytes", "Quantization")
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def dequantized_weight(layer: Any) -> torch.Tensor:
    """The weight that a quantized layer stands for, (out_features, in_features), in whichever dtype its library gives."""
    if packing_of(layer.weight) is not None:
        return dequantized_int4(layer)
    bnb = library("bitsandbytes", "Reading quantized weights")
    if isinstance(layer, bnb.nn.Linear4bit):
        weight: torch.Tensor = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return weight
    # The constants move from the weight to the layer's state in the first forward.
    rows = layer.state.CB if layer.state.CB is not None else layer.weight.CB
    constants = layer.state.SCB if layer.state.SCB is not None else layer.weight.SCB
    scaled: torch.Tensor = rows.float() * constants.float().view(-1, 1) / 127  # a row's largest is 127
    return scaled


def _quantize_in_place(model: Any, spec: QuantSpec, device: torch.device) -> None:
    quantizers = library("transformers.quantizers", "Quantization")
    quantizer = quantizers.AutoHfQuantizer.from_config(bitsandbytes_config(spec), pre_quantized=False)
    plain = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    quantizer.preprocess_model(model=model, device_map={"": device}, dtype=getattr(model, "dtype", None))
    for name in list(plain):
        module = model.get_submodule(name)
        source = plain.pop(name)
        if module is source:
            continue  # one of skip_modules
        weight = _int8(source.weight) if spec.kind == "int8" else _four_bit(source.weight, module)
        module.weight = weight.to(device) if spec.kind != "int8" else weight
        if source.bias is not None:
            module.bias = torch.nn.Parameter(source.bias.data, requires_grad=False)
        del source  # the unquantized weight goes before the next one is quantized
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer


def _four_bit(weight: torch.Tensor, module: Any) -> Any:
    bnb = library("bitsandbytes", "Quantization")
    # The twin's own placeholder carries every option (type, block size, double quantization), as in transformers' loader.
    return bnb.nn.Params4bit(weight.data, requires_grad=False, **module.weight.__dict__)


def _int8(weight: torch.Tensor) -> Any:
    # What Int8Params does on its way from CPU to GPU, without that way: 3B parameters would cross the bus twice.
    bnb = library("bitsandbytes", "Quantization")
    rows, constants, _ = bnb.functional.int8_vectorwise_quant(weight.data.contiguous().to(torch.float16))
    return bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=constants)


def _keep_portable(layer: Any) -> None:
    """Keep 4-bit weights in the one layout that every CPU and every backward pass can read.

    On CPUs with AVX512-BF16, bitsandbytes 0.50.2 repacks a Linear4bit in its first forward without gradients and reads
    the new layout in inference only: a training step after it gives zero or wrong gradients. The flag is its own, per layer.
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False


PACKINGS = {"Int4TilePackedTo4dTensor": "tile_packed_to_4d", "Int4OpaqueTensor": "opaque"}
"""torchao's classes of packed weights, and what it calls their packing."""
_LEAST_CAPABILITY = (8, 0)
"""tinygemm's kernels use bfloat16 tensor cores."""
_CPU_GROUPS = (32, 64, 128)
_AT_ONCE = 1024
"""Columns dequantized at a time: their unit vectors are (1024, columns) in bfloat16, 17 MB at 8192."""


def packing_for(device: torch.device) -> str:
    """The packing that this device's kernels read."""
    return "tile_packed_to_4d" if device.type == "cuda" else "opaque"


def packing_of(weight: Any) -> str | None:
    """How a weight is packed in int4; None for any other. Asks by name, so that torchao need not be installed."""
    return PACKINGS.get(type(weight).__name__)


def packed_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Linear layers with int4 weights, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and packing_of(module.weight) is not None
    }


def quantize_to_int4(model: torch.nn.Module, spec: QuantSpec, device: torch.device) -> None:
    """Pack every linear layer but `spec.skip_modules` in place, one after another: a layer's plain weight goes before the next is packed.

    Raises:
        BuildError: the device has no int4 kernels, or a layer's rows do not divide into groups.
        MissingLibraryError: torchao is not installed.
    """
    config = _config(spec, device)
    wanted = {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name.rpartition(".")[2] not in spec.skip_modules
    }
    for name, module in wanted.items():  # torchao would leave such a layer as it is, and say so in a log only
        if module.in_features % spec.group_size:
            raise BuildError(
                f"int4 in groups of {spec.group_size}: {name} has rows of {module.in_features} weights, which do not divide into them. "
                "Take a smaller group_size, or name the layer in skip_modules."
            )
    names = set(wanted)
    del wanted  # it holds no weights, but nothing else should hold a layer either
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
                "take nf4."
            )
        torchao = library("torchao.quantization", "Quantization to int4")
        return torchao.Int4WeightOnlyConfig(
            group_size=spec.group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    if device.type != "cpu":
        raise BuildError(f"int4 is packed for CUDA GPUs and for CPUs, not for {device.type}: take a device of these.")
    if spec.group_size not in _CPU_GROUPS:
        raise BuildError(
            f"A CPU has int4 kernels for groups of {', '.join(map(str, _CPU_GROUPS))} weights, not of {spec.group_size}: "
            "take one of these, or run on a GPU."
        )
    prototype = library("torchao.prototype.quantization.int4", "int4 on a CPU")
    return prototype.PrototypeInt4WeightOnlyConfig(group_size=spec.group_size, set_inductor_config=False)


def dequantized_int4(layer: Any) -> torch.Tensor:
    """The weight that the kernel multiplies with, (out_features, in_features) in bfloat16: its products with unit vectors.

    A sum of one term rounds nothing, so these are the values that the kernel decodes. That they are the right ones, and in their places,
    the audit's fact `weights` shows, which holds them against what was drawn.
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
