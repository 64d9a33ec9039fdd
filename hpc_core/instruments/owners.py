"""Find the tensors of a live model by owner: weights, adapter, gradients, optimizer state and KV cache."""

from __future__ import annotations

import contextlib
import gc
import itertools
import posixpath
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hpc_core.instruments.places import path_of


def weight_tensors(model: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Return parameters, buffers and quantization constants as "weights", and everything that peft added as "adapter"."""
    added = adapter_names(model)
    owned: dict[str, list[torch.Tensor]] = {"weights": [], "adapter": []}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = "adapter" if name in added else "weights"
        owned[kind] += owned_tensors(tensor)
    for module in model.modules():
        state = getattr(module, "state", None)  # the first forward of an int8 layer moves its constants here
        owned["weights"] += [
            value
            for value in (getattr(state, "CB", None), getattr(state, "SCB", None))
            if isinstance(value, torch.Tensor)
        ]
    return owned


def owned_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that hold a parameter's or buffer's values, and its quantization constants."""
    return [*_held(tensor), *_constants(tensor)]


def base_prefix(model: torch.nn.Module) -> str:
    """Return what stands before the base model's names in a model that peft wrapped, with its dot; empty for any other."""
    modules = dict(model.named_modules())
    wrapper: Any = next((module for module in modules.values() if hasattr(module, "get_base_model")), None)
    if wrapper is None:
        return ""
    base = wrapper.get_base_model()
    return next(f"{name}." for name, module in modules.items() if module is base)


def adapter_names(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of the parameters and buffers that peft added, whatever its method.

    They lie outside the base model, or in a layer beside the one that it wraps (`base_layer`, `original_module`). In a model that
    peft did not wrap, tensors called lora_A and the like are an adapter written by hand.
    """
    prefix = base_prefix(model)
    wrapped = {
        name.rpartition(".")[0]
        for name, _ in model.named_modules()
        if name.rpartition(".")[2] in ("base_layer", "original_module")
    }
    tensors = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if not prefix and not wrapped:
        return frozenset(name for name in tensors if ".lora_" in name)

    def added(name: str) -> bool:
        if not name.startswith(prefix):
            return True
        parts = name.split(".")
        owners = (".".join(parts[:end]) for end in range(1, len(parts)))
        return any(
            owner in wrapped and parts[owner.count(".") + 1] not in ("base_layer", "original_module")
            for owner in owners
        )

    return frozenset(name for name in tensors if added(name))


def base_name(name: str, prefix: str) -> str:
    """Return a base model's name without what peft put around it."""
    return name.removeprefix(prefix).replace(".base_layer", "").replace(".original_module", "")


def by_module(
    model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield parameters, buffers, gradients and optimizer state that exist now, by the path of the owning module.

    If parameters share a storage, as queries, keys and values do in the tuned engine, the innermost module around all of them
    owns it.
    """
    names: dict[int, str] = {}
    around: dict[int, str] = {}
    owners = [] if model is None else [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in owners:
        path, storage = path_of(name.rpartition(".")[0]), _storage_of(tensor)
        around[storage] = _common(around.get(storage, path), path)
    for name, tensor in owners:
        names[id(tensor)] = path_of(name.rpartition(".")[0])
        grad = [] if tensor.grad is None else [tensor.grad]
        if (path := around[_storage_of(tensor)]) == names[id(tensor)]:
            yield path, [*_held(tensor), *_constants(tensor), *grad]
        else:
            yield path, list(_held(tensor))
            yield names[id(tensor)], [*_constants(tensor), *grad]
    for parameter, state in () if optimizer is None else optimizer.state.items():
        path = names.get(id(parameter), "")
        yield path, [value for value in state.values() if isinstance(value, torch.Tensor)]


def _storage_of(tensor: torch.Tensor) -> int:
    """Return an id of the storage that fake tensors have too; they have no address."""
    return int(next(_held(tensor)).untyped_storage()._cdata)


def _common(one: str, other: str) -> str:
    return posixpath.commonpath([each.replace(".", "/") for each in (one, other)]).replace("/", ".")


def _held(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that hold a tensor's values: itself, or the parts of a wrapper such as torchao's packed weights."""
    wrapper: Any = tensor
    if not is_traceable_wrapper_subclass(wrapper):
        yield tensor
        return
    names, _ = wrapper.__tensor_flatten__()
    for name in names:
        yield from _held(getattr(wrapper, name))


def _constants(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    holder: Any = tensor
    for name in ("CB", "SCB"):
        value = getattr(holder, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    yield from _quant_state(getattr(holder, "quant_state", None))


def _quant_state(state: Any) -> Iterator[torch.Tensor]:
    if state is None:
        return
    for name in ("absmax", "code", "offset"):
        value = getattr(state, name, None)
        if isinstance(value, torch.Tensor):
            yield value
    yield from _quant_state(getattr(state, "state2", None))  # double quantization


def gradient_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """Return the gradients that exist now."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the optimizer's state, including the constants of 8-bit optimizers."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Return keys and values of a transformers cache."""
    found = []
    for layer in getattr(cache, "layers", ()):
        found += [
            value
            for value in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(value, torch.Tensor)
        ]
    return found


def living_tensors(device: torch.device) -> list[torch.Tensor]:
    """Return every tensor on `device` that Python knows. Those without an owner, such as forgotten references, are "other"."""
    # type(), not isinstance: a lazy proxy would import its package to answer.
    # Check each type once: checking half a million objects takes longer than a tiny step.
    things = gc.get_objects()
    # A wrapper's own storage has no memory; the tensors inside it are in this list too.
    kinds = {
        kind
        for kind in set(map(type, things))
        if issubclass(kind, torch.Tensor) and not hasattr(kind, "__tensor_flatten__")
    }
    found: list[torch.Tensor] = list(itertools.compress(things, map(kinds.__contains__, map(type, things))))
    here = [tensor for tensor in found if tensor.device == device and tensor.layout == torch.strided]
    # A fake tensor names a device, and has its storage on "meta": torch.compile keeps those that it traced with.
    return [tensor for tensor in here if tensor.untyped_storage().device.type == device.type]


class Bystanders:
    """The storages that are alive now, from libraries and earlier cases: they do not belong to the step."""

    def __init__(self, device: torch.device):
        storages = [tensor.untyped_storage() for tensor in living_tensors(device)]
        # A weak reference tells a storage from a later one with the same id.
        self._known = {id(storage): weakref.ref(storage) for storage in storages}

    def without(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors whose storage was not alive then."""
        return [tensor for tensor in tensors if not self._was_alive(tensor.untyped_storage())]

    def _was_alive(self, storage: torch.UntypedStorage) -> bool:
        known = self._known.get(id(storage))
        return known is not None and known() is storage


def owned_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of the storages behind these tensors, each counted once."""
    # Not by address: the storages of fake tensors have none.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass
class LastCache:
    """The KV cache that the model was last called with; None before the first call, or if it had none."""

    value: Any = None


@contextlib.contextmanager
def watch_cache(model: torch.nn.Module) -> Iterator[LastCache]:
    """Record the cache object that `generate` passes to the model, whatever this version calls the argument."""
    cache = LastCache()

    def before_forward(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        cache.value = next(
            (value for value in arguments.values() if hasattr(value, "layers") and hasattr(value, "get_seq_length")),
            None,
        )

    handle = model.register_forward_pre_hook(before_forward, with_kwargs=True)
    try:
        yield cache
    finally:
        handle.remove()
