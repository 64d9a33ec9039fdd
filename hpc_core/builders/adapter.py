"""Adapters through peft, any method by its configuration, and peft's preparation of quantized models. `hpc_core.bounds.adapter` describes the tensors."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from hpc_core.builders.quantization import is_conv1d
from hpc_core.case.errors import BuildError, library
from hpc_core.case.parts import LORA_VARIANTS, AdapterSpec
from hpc_core.instruments.owners import adapter_names


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


@dataclass(frozen=True)
class Attached:
    """What peft built when it attached an adapter."""

    trainable: dict[str, int] = field(default_factory=dict)
    """How many numbers each trainable tensor has, by name."""
    dtypes: list[str] = field(default_factory=list)
    """Of the adapter's weights."""
    rewrote: bool = False
    """Whether the method changes the base weights when it begins, as PiSSA and LoftQ do."""


_ATTACHED: weakref.WeakKeyDictionary[torch.nn.Module, Attached] = weakref.WeakKeyDictionary()


def attached(model: torch.nn.Module) -> Attached:
    """Return what peft built around this model; nothing if it has no adapter."""
    return _ATTACHED.get(model, Attached())


_SHORT_NAMES = {"prompt": "prompt_tuning", "prefix": "prefix_tuning", "p-tuning": "p_tuning"}


def adapter_config(spec: AdapterSpec, model: torch.nn.Module) -> Any:
    """Return peft's configuration of this adapter, with the options handed on as they are.

    Raises:
        BuildError: peft has no such method, the method no such setting, or a setting is refused.
        MissingLibraryError: peft is not installed.
    """
    peft = library("peft", f"The adapter {spec.method}")
    table = library("peft.mapping", f"The adapter {spec.method}").PEFT_TYPE_TO_CONFIG_MAPPING
    kinds = {kind.value.lower(): config for kind, config in table.items()}
    name = "lora" if spec.is_lora else _SHORT_NAMES.get(spec.method, spec.method)
    if name not in kinds:
        known = ", ".join(sorted({*LORA_VARIANTS, *_SHORT_NAMES, *kinds}))
        raise BuildError(f"peft {peft.__version__} has no method {spec.method!r}. It has: {known}.")
    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", **LORA_VARIANTS.get(spec.method, {}), **spec.options}
    if spec.is_lora:
        # GPT-2's Conv1D is stored transposed; peft warns and corrects it otherwise.
        turned = any(is_conv1d(module) for module in model.modules())
        settings |= {"r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": spec.dropout, "fan_in_fan_out": turned}
    if spec.targets is not None:
        settings["target_modules"] = list(spec.targets) if isinstance(spec.targets, tuple) else spec.targets
    if spec.modules_to_save:
        settings["modules_to_save"] = list(spec.modules_to_save)
    fields = {each.name for each in dataclasses.fields(kinds[name]) if each.init}
    if unknown := sorted(set(settings) - fields):
        hint = " Use targets=None: it wraps no module." if unknown == ["target_modules"] else ""
        raise BuildError(
            f"peft's {kinds[name].__name__} has no setting {', '.join(unknown)}.{hint} It has: {', '.join(sorted(fields))}."
        )
    try:
        return getattr(peft, kinds[name].__name__)(**settings)  # as users call it
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise BuildError(f"peft refuses the settings of {spec.method}: {_one_line(error)}") from error


def attach_adapter(model: torch.nn.Module, spec: AdapterSpec) -> torch.nn.Module:
    """Return the model wrapped by peft: the base frozen, the adapter trainable; LoRA's weights are stored in `spec.dtype`.

    Raises:
        BuildError: a target module was not found, or peft cannot build the adapter.
        MissingLibraryError: peft is not installed.
    """
    config = adapter_config(spec, model)
    dtype = getattr(torch, spec.dtype)
    before = {id(parameter): _contents(parameter) for parameter in model.parameters()}
    try:
        wrapped = library("peft", "An adapter").get_peft_model(
            model, config, autocast_adapter_dtype=dtype == torch.float32
        )
    except (ValueError, TypeError, ImportError, NotImplementedError, KeyError, AssertionError) as error:
        on = f" to {', '.join(spec.targets)}" if isinstance(spec.targets, tuple) else ""
        raise BuildError(
            f"peft cannot attach {spec.method}{on}: {_one_line(error)} This model has: {_targets(model)}."
        ) from error
    assert isinstance(wrapped, torch.nn.Module)
    added = adapter_names(wrapped)
    base = [parameter for name, parameter in wrapped.named_parameters() if name not in added]
    adapter = adapter_parameters(wrapped)
    if spec.is_lora or dtype != torch.float32:
        for parameter in adapter.values():
            parameter.data = parameter.data.to(dtype)
    missing = [
        target
        for target in (spec.targets if isinstance(spec.targets, tuple) else ())
        if not any(f".{target}." in name for name in added)
    ]
    if missing:
        raise BuildError(
            f"No module was named {', '.join(missing)}: the adapter would train less than the case asks for. "
            f"Choose targets from: {_targets(model)}."
        )
    _ATTACHED[wrapped] = Attached(
        {name: each.numel() for name, each in wrapped.named_parameters() if each.requires_grad},
        sorted({str(parameter.dtype).removeprefix("torch.") for parameter in adapter.values()}),
        any(before.get(id(parameter)) != _contents(parameter) for parameter in base),
    )
    return wrapped


def _contents(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """Return what changes when a parameter's values are written or replaced."""
    held = parameter.qdata if hasattr(parameter, "qdata") else parameter  # torchao's wrapper has no storage of its own
    return held.untyped_storage()._cdata, parameter._version


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
        if kind == "weight" and parameter.dim() == 2 and "lora_" not in name and "embed" not in last:
            found[last] = None
    return ", ".join(found)


def adapter_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's weights of a wrapped model, by name, without whole modules that it trains (`modules_to_save`)."""
    added = adapter_names(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if name in added and ".modules_to_save." not in name
    }
