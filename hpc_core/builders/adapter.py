"""LoRA adapters through peft, and peft's preparation of quantized models. `hpc_core.bounds.adapter` describes the tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from hpc_core.builders.quantization import is_conv1d
from hpc_core.case.errors import BuildError, library
from hpc_core.case.parts import AdapterSpec


def prepare_for_training(model: torch.nn.Module, checkpointing: str) -> torch.nn.Module:
    """Call peft's `prepare_model_for_kbit_training`: it freezes, casts what is not quantized to float32, and checkpoints by default.

    "as-prepare-leaves-it" calls it without arguments, as most code does. The other kinds of checkpointing are passed on.

    Raises:
        MissingLibraryError: peft is not installed.
    """
    peft = library("peft", "Preparing a quantized model")
    options: dict[str, Any] = {}
    if checkpointing == "off":
        options = {"use_gradient_checkpointing": False}
    elif checkpointing != "as-prepare-leaves-it":
        options = {"gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"}}
    prepared = peft.prepare_model_for_kbit_training(model, **options)
    assert isinstance(prepared, torch.nn.Module)
    return prepared


def attach_adapter(model: torch.nn.Module, spec: AdapterSpec) -> torch.nn.Module:
    """Return the model wrapped by peft: the base frozen, LoRA weights trainable and stored in `spec.dtype`.

    Raises:
        BuildError: a target module was not found.
        MissingLibraryError: peft is not installed.
    """
    peft = library("peft", "A LoRA adapter")
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.targets),
        fan_in_fan_out=any(
            is_conv1d(module) for module in model.modules()
        ),  # GPT-2; peft warns and corrects it otherwise
        task_type="CAUSAL_LM",
    )
    dtype = getattr(torch, spec.dtype)
    try:
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    except ValueError as error:
        raise BuildError(
            f"peft cannot attach LoRA to {', '.join(spec.targets)}: {error} This model has: {_targets(model)}."
        ) from error
    assert isinstance(wrapped, torch.nn.Module)
    adapter = adapter_parameters(wrapped)
    for parameter in adapter.values():
        parameter.data = parameter.data.to(dtype)
    missing = [target for target in spec.targets if not any(f".{target}." in name for name in adapter)]
    if missing:
        raise BuildError(
            f"No module was named {', '.join(missing)}: the adapter would train less than the case asks for. "
            f"Choose targets from: {_targets(model)}."
        )
    return wrapped


def merged(wrapped: Any) -> torch.nn.Module:
    """Return the base model with the adapter's update merged into its weights. 4-bit weights are quantized again."""
    with warnings.catch_warnings():
        # peft warns for each 4-bit layer that merging rounds. That is expected.
        warnings.filterwarnings("ignore", message="Merge lora module to", category=UserWarning)
        model = wrapped.merge_and_unload()
    assert isinstance(model, torch.nn.Module)
    return model


def _targets(model: torch.nn.Module) -> str:
    """Return the names that targets can be chosen from: those of the model's matrices, without embeddings."""
    found: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        owner, _, kind = name.replace(".base_layer", "").rpartition(".")
        last = owner.rpartition(".")[2]
        if kind == "weight" and parameter.dim() == 2 and ".lora_" not in name and "embed" not in last:
            found[last] = None
    return ", ".join(found)


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's weights of a wrapped model, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}
