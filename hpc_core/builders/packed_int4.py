"""int4 weights by torchao: which packing a device has, which layers hold it, and the weight that it stands for.

On a GPU torchao's `Int4WeightOnlyConfig` packs for torch's tinygemm kernels ("tile_packed_to_4d"). A CPU cannot make that packing; it has
kernels for one of its own ("opaque", a prototype of torchao's), with the same codes, scales and zeros. A record names the packing it ran.
"""

from __future__ import annotations

from typing import Any

import torch

from hpc_core.builders.libraries import library
from hpc_core.case.case import QuantSpec
from hpc_core.case.errors import BuildError

__all__ = ["PACKINGS", "dequantized_int4", "packed_layers", "packing_for", "packing_of", "quantize_to_int4"]

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
