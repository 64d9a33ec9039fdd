"""Who owns which memory: the storages of weights, adapter, gradients, optimizer state and KV cache of a live model."""

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
    """Parameters, buffers and quantization constants, as "weights" and "adapter" (everything that LoRA added)."""
    owned: dict[str, list[torch.Tensor]] = {"weights": [], "adapter": []}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        kind = "adapter" if ".lora_" in name else "weights"
        owned[kind] += [*_held(tensor), *_constants(tensor)]
    for module in model.modules():
        state = getattr(module, "state", None)  # int8 layers move their constants here in the first forward
        owned["weights"] += [
            value
            for value in (getattr(state, "CB", None), getattr(state, "SCB", None))
            if isinstance(value, torch.Tensor)
        ]
    return owned


def by_module(
    model: torch.nn.Module | None, optimizer: torch.optim.Optimizer | None
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Parameters, buffers, gradients and optimizer state that exist now, by the path of the module whose they are.

    Parameters in one storage, as the tuned engine joins queries, keys and values, are those of the module around them.
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
    """By the storage itself, not its address, which a fake tensor has none of."""
    return int(next(_held(tensor)).untyped_storage()._cdata)


def _common(one: str, other: str) -> str:
    return posixpath.commonpath([each.replace(".", "/") for each in (one, other)]).replace("/", ".")


def _held(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold a tensor's values: itself, or what a wrapper such as torchao's packed weights is made of."""
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
    """The gradients that exist now."""
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's state, 8-bit constants included."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def cache_tensors(cache: Any) -> list[torch.Tensor]:
    """Keys and values of a transformers cache."""
    found = []
    for layer in getattr(cache, "layers", ()):
        found += [
            value
            for value in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if isinstance(value, torch.Tensor)
        ]
    return found


def living_tensors(device: torch.device) -> list[torch.Tensor]:
    """Every tensor on `device` that Python holds anywhere: what nobody owns shows as "other", such as a forgotten reference."""
    # type(), not isinstance: a lazy proxy would import its package when asked for its class.
    # By the few types that there are: asking half a million objects one by one takes longer than a tiny step.
    things = gc.get_objects()
    # A wrapper has a storage without memory; what it wraps is found by itself.
    kinds = {
        kind
        for kind in set(map(type, things))
        if issubclass(kind, torch.Tensor) and not hasattr(kind, "__tensor_flatten__")
    }
    found: list[torch.Tensor] = list(itertools.compress(things, map(kinds.__contains__, map(type, things))))
    return [tensor for tensor in found if tensor.device == device and tensor.layout == torch.strided]


class Bystanders:
    """The storages that are alive now: what a process holds anyway, from libraries and earlier cases, is not the step's."""

    def __init__(self, device: torch.device):
        storages = [tensor.untyped_storage() for tensor in living_tensors(device)]
        # By reference, not by address: a storage that dies leaves its address to another.
        self._known = {id(storage): weakref.ref(storage) for storage in storages}

    def without(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Those of these tensors whose storage was not alive then."""
        return [tensor for tensor in tensors if not self._was_alive(tensor.untyped_storage())]

    def _was_alive(self, storage: torch.UntypedStorage) -> bool:
        known = self._known.get(id(storage))
        return known is not None and known() is storage


def owned_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages behind these tensors, each counted once."""
    # By the storage itself, not its address: the storages of fake tensors have none.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@dataclass
class CacheSeen:
    """The KV cache that the model was last called with; None before the first call and where none is used."""

    seen: Any = None


@contextlib.contextmanager
def watch_cache(model: torch.nn.Module) -> Iterator[CacheSeen]:
    """Note the cache object that `generate` hands to the model, whatever the argument is called in this version."""
    cache = CacheSeen()

    def called(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        cache.seen = next(
            (value for value in arguments.values() if hasattr(value, "layers") and hasattr(value, "get_seq_length")),
            None,
        )

    handle = model.register_forward_pre_hook(called, with_kwargs=True)
    try:
        yield cache
    finally:
        handle.remove()
