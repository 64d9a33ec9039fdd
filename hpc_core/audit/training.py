"""Facts of training: trainable parameters, optimizer, checkpointing, dropout, autocast, gradients, tokens."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from hpc_core.audit.forwards import AuditedStep, Forwards
from hpc_core.audit.model import linear_layers, names
from hpc_core.audit.parts import beside_text
from hpc_core.bounds.adapter import has_closed_form, layer_parameters, layer_tensors, tensor_sizes
from hpc_core.builders.adapter import adapter_parameters, attached
from hpc_core.builders.data.batching import IGNORED_LABEL
from hpc_core.builders.data.device_batches import DeviceBatch
from hpc_core.builders.quantization import is_conv1d
from hpc_core.case.case import Case
from hpc_core.case.parts import AdapterSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.finetune import FinetuneProgram
from hpc_core.instruments.owners import adapter_names
from hpc_core.record.findings import Findings, checked
from hpc_core.record.record import Fact

_ADAPTER = re.compile(r"(\w+)\.(lora_\w+)\b")
_SHOWN = 8


def trainable_facts(case: Case, model: torch.nn.Module) -> Findings:
    """Compare trainable parameters, by count and by name, with the case; a generation trains none, so it has no such facts."""
    if not isinstance(case.workload, FinetuneSpec):
        return Findings()
    adapter = case.adapter
    return checked(
        {
            "trainable_parameters": lambda: Fact(
                asked=_asked_count(case, model), seen=sum(part.numel() for part in _live(model).values())
            ),
            "trainable_names": lambda: _names(case, model),
            "adapter_dtype": lambda: (
                None
                if adapter is None
                else Fact(
                    asked=[adapter.dtype] if adapter.is_lora else attached(model).dtypes,
                    seen=names(part.dtype for part in adapter_parameters(model).values()),
                )
            ),
            "adapted_modules": lambda: _adapted(case, model),
        },
    )


def _live(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: part for name, part in model.named_parameters() if part.requires_grad}


def _asked_count(case: Case, model: torch.nn.Module) -> int:
    """Return how many parameters the case trains, in closed form: all of them, or the tensors of its adapter."""
    assert case.model is not None
    shape = case.model.sizes
    if case.adapter is None:
        return sum(part.numel() for part in model.parameters()) if shape is None else shape.parameter_count()
    if shape is not None and has_closed_form(shape, case.adapter):
        return sum(tensor_sizes(case.adapter, shape))
    return _adapter_count(case.adapter, model) if case.adapter.is_plain else sum(attached(model).trainable.values())


def _adapter_count(adapter: AdapterSpec, model: torch.nn.Module) -> int:
    """Count the adapter's parameters from the sizes of the linear layers, for a model whose shape has no closed form.

    Raises:
        LookupError: a target is not a linear layer, so there is no closed form.
    """
    layers: dict[str, list[tuple[int, int]]] = {target: [] for target in adapter.targets or ()}
    added = adapter_names(model)
    for name, module in model.named_modules():
        size = _linear_size(module)
        if size is not None and f"{name}.weight" not in added:
            layers.get(name.removesuffix(".base_layer").rpartition(".")[2], []).append(size)
    empty = [target for target, found in layers.items() if not found]
    if empty:
        raise LookupError(f"no linear layer is called {', '.join(empty)}")
    return sum(layer_parameters(adapter, *size) for found in layers.values() for size in found)


def _linear_size(module: Any) -> tuple[int, int] | None:
    """Return (out_features, in_features) of a linear layer or a Conv1D; None for any other module."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if is_conv1d(module) else None


def _names(case: Case, model: torch.nn.Module) -> Fact:
    """Compare the names of trainable tensors: "all", or `target.lora_A` for an adapter's, whatever the layer."""
    live = _live(model)
    if case.adapter is None:
        frozen = [name for name, _ in model.named_parameters() if name not in live]
        return Fact(asked="all", seen=f"all but {_few(frozen)}" if frozen else "all")
    if not case.adapter.is_plain:
        built = attached(model).trainable
        wrong = [f"{name} is frozen" for name in built if name not in live]
        wrong += [f"{name} is trained" for name in live if name not in built]
        every = f"the {len(built)} tensors that peft trains"
        return Fact(asked=every, seen=f"{len(live)} tensors: {_few(wrong)}" if wrong else every)
    asked = sorted(
        f"{target}.{half}" for target in case.adapter.targets or () for half in layer_tensors(case.adapter, 1, 1)
    )
    frozen = [name for name in adapter_parameters(model) if name not in live]
    trained = sorted({_short(name) for name in live})
    if frozen:
        return Fact(asked=asked, seen=f"{len(live)} tensors, but not {_few(frozen)}")
    return Fact(asked=asked, seen=trained if len(trained) <= len(asked) + _SHOWN else _few(trained))


def _adapted(case: Case, model: torch.nn.Module) -> Fact | None:
    """Compare the modules that peft wrapped with the targets: every one of that name, or every linear layer but the head.

    None where peft itself chose them, and for methods that wrap none.
    """
    adapter = case.adapter
    if adapter is None or adapter.is_plain:
        return None  # the names of trained tensors say it
    adapted = {name.removesuffix(".base_layer") for name, _ in model.named_modules() if name.endswith(".base_layer")}
    if adapter.targets == "all-linear":
        head: Any = getattr(model, "get_output_embeddings", lambda: None)()
        head = getattr(head, "original_module", head)
        asked = {name for name, layer in linear_layers(model).items() if layer is not head}
    elif isinstance(adapter.targets, tuple):
        inner = ("base_layer", "original_module")
        named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] not in inner}
        asked = {name for name in named if any(f".{name}".endswith(f".{target}") for target in adapter.targets)}
    else:
        return None
    missing, more = sorted(asked - adapted), sorted(adapted - asked)
    if not missing and not more:
        return Fact(asked=len(asked), seen=len(asked))
    said = f"not adapted: {_few(missing)}" if missing else f"adapted too: {_few(more)}"
    return Fact(asked=len(asked), seen=f"{len(adapted)}; {said}")


def _short(name: str) -> str:
    found = _ADAPTER.search(name)
    return name if found is None else f"{found[1]}.{found[2]}"


def _few(listed: list[str]) -> str:
    more = f" and {len(listed) - 1} more" if len(listed) > 1 else ""
    return f"{listed[0]}{more}" if listed else "nothing"


_SMALLEST_8BIT = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
_SHORTEST = 3
"""In shorter rows attention has only one key to choose from, so a zero gradient of queries and keys is correct."""


@dataclass(frozen=True)
class Ran:
    """What was observed in the counted steps."""

    operators: Counter[str]
    checkpointing: str | None
    """"on", "off" or a description, from the counted forwards; None if the model has no decoder layers."""
    planned: str | None = None
    """The same, as a memory budget planned it; None without a budget."""


def training_facts(
    case: Case, workload: FinetuneSpec, program: FinetuneProgram, ran: Ran, step: AuditedStep
) -> Findings:
    """Return all facts of a fine-tuning case that are not about its weights."""
    forwards = step.forwards
    has_kind = workload.checkpointing in ("reentrant", "non-reentrant") and ran.checkpointing == "on"
    found = Findings()
    if workload.checkpointing == "as-prepare-leaves-it":
        found = Findings(notes=(f"prepare left checkpointing {ran.checkpointing}, {_checkpointing_kind(forwards)}",))
    autocast = "bfloat16" if workload.precision == "autocast-bf16" else "off"
    return found | checked(
        {
            "checkpointing": lambda: _checkpointing(workload, ran),
            "checkpointing_kind": lambda: (
                Fact(asked=workload.checkpointing, seen=_checkpointing_kind(forwards)) if has_kind else None
            ),
            "optimizer": lambda: Fact(asked=workload.optimizer, seen=optimizer_kind(program.optimizer)),
            "optimizer_state_dtype": lambda: _state_dtypes(workload, program),
            "training_mode": lambda: Fact(asked="on", seen=_mode(forwards)),
            "dropout": lambda: _dropout(case, program, ran),
            "autocast": lambda: Fact(asked=[autocast], seen=sorted(forwards.autocast)),
            "gradients": lambda: _gradients(program, step),
            "trained_tokens": lambda: _trained_tokens(workload, program),
            "padded_tokens": lambda: _padded_tokens(workload, program),
            "batch": lambda: _batch(workload, program, forwards),
        },
    )


def _checkpointing(workload: FinetuneSpec, ran: Ran) -> Fact:
    if ran.checkpointing is None:
        raise LookupError("transformers marks no module of this model as a decoder layer")
    return Fact(asked=ran.planned or ("off" if workload.checkpointing == "off" else "on"), seen=ran.checkpointing)


def _checkpointing_kind(forwards: Forwards) -> str:
    return "reentrant" if forwards.reentrant else "non-reentrant"


def optimizer_kind(optimizer: Any) -> str:
    """Return the name of this live optimizer, as a case writes it."""
    name = type(optimizer).__name__.lower()
    base = "adamw" if "adamw" in name else name
    if type(optimizer).__module__.startswith("bitsandbytes"):
        paged = "paged-" if optimizer.is_paged else ""
        return f"{base}-{paged}{optimizer.args.optim_bits}bit"
    for implementation in ("fused", "foreach"):
        if all(group.get(implementation) for group in optimizer.param_groups):
            return f"{base}-{implementation}"
    return base


def _state_dtypes(workload: FinetuneSpec, program: FinetuneProgram) -> Fact:
    """Compare the dtypes of the moments: the parameter's, or uint8 for large tensors of an 8-bit optimizer."""
    optimizer: Any = program.optimizer
    parameters = [part for group in optimizer.param_groups for part in group["params"]]
    if workload.optimizer.endswith("8bit"):
        asked = names(torch.uint8 if part.numel() >= _SMALLEST_8BIT else torch.float32 for part in parameters)
    else:
        asked = names(part.dtype for part in parameters)
    moments = ("exp_avg", "exp_avg_sq", "state1", "state2")
    seen = names(state[name].dtype for state in optimizer.state.values() for name in moments if name in state)
    return Fact(asked=asked, seen=seen)


def _mode(forwards: Forwards) -> str:
    if not forwards.calls:
        raise LookupError("no forward was seen")
    evaluating = forwards.modules - forwards.training
    return f"off in {evaluating} of {forwards.modules} modules" if evaluating else "on"


def _dropout(case: Case, program: FinetuneProgram, ran: Ran) -> Fact | None:
    """Compare the rates of the adapter's live dropout modules, and check that a dropout operator ran."""
    if case.adapter is None or not case.adapter.is_lora:
        return None  # the rates of other methods have other names
    asked = [case.adapter.dropout] if case.adapter.dropout else []
    modules = [
        module
        for name, module in program.model.named_modules()
        if "lora_dropout" in name and isinstance(module, torch.nn.Dropout)
    ]
    rates = sorted({module.p if module.training else 0.0 for module in modules})
    dropped = any(name.startswith(("aten.native_dropout.", "aten.bernoulli")) for name in ran.operators)
    if rates and any(rates) and not dropped:
        return Fact(asked=asked, seen=f"{rates}, but no operator of dropout ran")
    return Fact(asked=asked, seen=rates)


def _gradients(program: FinetuneProgram, step: AuditedStep) -> Fact | None:
    """Return whether every trainable parameter received a finite gradient that is not all zeros.

    Zeros are allowed in float16, where a whole gradient may underflow, and in rows of two tokens, where attention learns
    nothing. LoRA's A has a zero gradient only in the first step, while B is zero. A loss that is not finite is reported by a
    fact of its own, so its gradients are not checked.
    """
    if program.loss is None or not math.isfinite(float(program.loss)):
        return None
    dtypes = {name: part.dtype for name, part in program.model.named_parameters()}
    long = program.batches[program.widest].ids.shape[1] >= _SHORTEST
    wrong = {}
    beside = tuple(f"{name}." for name in beside_text(program.model))  # a note says that these never run
    gradients = {name: largest for name, largest in step.gradients.items() if not name.startswith(beside)}
    for name, largest in gradients.items():
        if largest is None:
            wrong[name] = "has none"
        elif not math.isfinite(largest):
            wrong[name] = "is not finite"
        elif largest == 0 and long and dtypes[name] != torch.float16:
            wrong[name] = "is zero"
    count = len(gradients)
    reached = f"{count - len(wrong)} of {count} reached"
    if wrong:
        first = next(iter(wrong))
        reached += f"; {first} {wrong[first]}"
    return Fact(asked=f"{count} of {count} reached", seen=reached)


def _labels(batch: Any) -> int:
    return int((batch != IGNORED_LABEL).sum())


def _padding(mask: Any) -> int:
    return 0 if mask is None else int((mask == 0).sum())


def _pass(workload: FinetuneSpec, program: FinetuneProgram) -> list[DeviceBatch]:
    return [program.batches[index % len(program.batches)] for index in range(workload.steps)]


def _is_full(workload: FinetuneSpec) -> bool:
    """Return whether every row is full, so that token counts have a closed form; other data is counted."""
    return workload.packing or workload.data.source == "random"


def _trained_tokens(workload: FinetuneSpec, program: FinetuneProgram) -> Fact:
    """Compare the labels on the device over a whole timed pass."""
    expected = program.tokens_of(workload.steps)
    if _is_full(workload):
        expected = workload.batch * workload.length * workload.steps
    return Fact(asked=expected, seen=sum(_labels(batch.labels) for batch in _pass(workload, program)))


def _padded_tokens(workload: FinetuneSpec, program: FinetuneProgram) -> Fact:
    expected = 0 if _is_full(workload) else program.padded_of(workload.steps)
    return Fact(asked=expected, seen=sum(_padding(batch.mask) for batch in _pass(workload, program)))


def _batch(workload: FinetuneSpec, program: FinetuneProgram, forwards: Forwards) -> Fact:
    """Compare the batch that the model itself received in the audited step."""
    widest = program.batches[program.widest]
    given = forwards.first
    rows, width = given["input_ids"].shape
    received = _describe(rows, width, _labels(given["labels"]), _padding(given.get("attention_mask")))
    if _is_full(workload):
        expected = _describe(workload.batch, workload.length, workload.batch * workload.length, 0)
    else:
        expected = _describe(workload.batch, widest.ids.shape[1], widest.tokens, widest.padded)
    return Fact(asked=expected, seen=received)


def _describe(rows: int, width: int, labels: int, masked: int) -> str:
    return f"{rows} x {width} ids, {labels} labels, {masked} masked"
