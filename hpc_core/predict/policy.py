"""The values of fake tensors, as far as they are known: what Python gets when it reads one.

The code under test must take the branch that it takes on real data. Most of what it reads does not come from data: token ids and
masks that the host made, positions, counts of tokens, one random number for a dropout. So small tensors carry their real values
beside the fake ones: an operator whose inputs are all known runs on them too. Random weights, activations and losses are unknown,
and so is what depends on them; but they are finite.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._pytree import tree_leaves, tree_map_only

_MOST_ELEMENTS = 1 << 20
"""Elements of integers or truth values that are followed: a mask of 512 rows of 2,048 tokens."""
_MOST_NUMBERS = 1 << 16
"""Elements of other numbers: peft makes masks of its virtual tokens in float32."""
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_SHAPE_ONLY = {"ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full"}
"""Operators that use an input's shape, not its values."""
_OVERWRITES = {"fill_", "zero_", "copy_", "random_", "uniform_", "normal_", "bernoulli_"}
"""Operators that replace all that a tensor held."""
_DECIDES = {"bitwise_and": False, "logical_and": False, "bitwise_or": True, "logical_or": True}
"""The input that decides the output, whatever the other one is."""
_CHECKS_GRADIENTS = "_amp_foreach_non_finite_check_and_unscale_"


class ValuePolicy:
    """Follow the values of small tensors through the operators that make them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Any], torch.Tensor]] = {}
        """By the `id` of a fake storage: that storage, and its values as a flat tensor on the CPU."""

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Return the values of a tensor, as a real tensor that shares them, or None if they are unknown."""
        if not isinstance(tensor, FakeTensor):
            return tensor if _is_small(tensor) else None
        storage = tensor.untyped_storage()
        found = self._known.get(id(storage))
        if found is None or found[0]() is not storage or found[1].dtype != tensor.dtype:
            return None
        with unset_fake_temporarily():
            return found[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def declare(self, tensor: torch.Tensor, *, value: bool) -> None:
        """Set every value of a tensor."""
        self._learn(tensor, _filled(tensor, value=value))

    def scalar(self, tensor: torch.Tensor) -> bool | int | float:
        """Return the value of a scalar. An unknown one is False, zero or one: own code that decides by it was refused before."""
        values = self.of(tensor)
        if values is not None:
            with unset_fake_temporarily():
                return values.item()
        if tensor.dtype == torch.bool:
            return False
        return 1.0 if tensor.dtype.is_floating_point else 0

    def follow(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]) -> None:
        """Record an operator that ran on fake tensors: run it on the values of its inputs, or forget those that it changed."""
        name = func._schema.name.partition("::")[2]
        changed = _changed(func, args, kwargs)
        if name == _CHECKS_GRADIENTS:
            return  # gradients are finite, so `found_inf` stays as it is
        if not changed and (name in _EMPTY or not all(map(_is_small, outputs)) or _shares(outputs, inputs)):
            return
        values = None
        if all(map(_is_small, changed)) and not (_is_random(func) and any(map(_is_drawn, outputs))):
            values = self._run(func, name, args, kwargs, inputs) or self._decided(name, args, inputs, outputs)
        if values is None:
            for lost in changed:
                self._known.pop(id(lost.untyped_storage()), None)
        elif not changed:
            for tensor, value in zip(outputs, values, strict=True):
                self._learn(tensor, value)

    def run(self, func: Any, args: Any, kwargs: Any, inputs: Sequence[Any]) -> Any:
        """Return what an operator returns for the values of its inputs, or None if they are unknown."""
        name = func._schema.name.partition("::")[2]
        known: dict[int, torch.Tensor] = {}
        for tensor in inputs:
            values = _filled(tensor, value=False) if name in _SHAPE_ONLY else self.of(tensor)
            if values is None:
                return None
            known[id(tensor)] = values
        given, named = tree_map_only(torch.Tensor, lambda tensor: known[id(tensor)], (args, kwargs))
        on_cpu = {key: value for key, value in named.items() if key not in ("device", "pin_memory")}
        with unset_fake_temporarily():
            return func(*given, **on_cpu)

    def _run(self, func: Any, name: str, args: Any, kwargs: Any, inputs: Sequence[Any]) -> list[torch.Tensor] | None:
        """Return the values of an operator's outputs, or None if they are unknown. An operator in place changes known values."""
        if name in _OVERWRITES and self.of(args[0]) is None and _is_whole(args[0]):
            self.declare(args[0], value=False)
        found = self.run(func, args, kwargs, inputs)
        return None if found is None else [value for value in tree_leaves(found) if isinstance(value, torch.Tensor)]

    def _decided(
        self, name: str, args: Any, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor] | None:
        """Return an output that does not depend on the unknown input: because another one decides, or because numbers are finite."""
        if name in _DECIDES:
            for values in map(self.of, inputs):
                with unset_fake_temporarily():
                    if values is not None and bool((values.bool() == _DECIDES[name]).all()):
                        return [_filled(outputs[0], value=_DECIDES[name])]
        if name in ("isinf", "isnan"):
            return [_filled(outputs[0], value=False)]
        if name in ("eq", "ne") and (args[0] is args[1] or args[1] == math.inf):  # as `isfinite` and `isnan` ask
            return [_filled(outputs[0], value=(name == "eq") == (args[0] is args[1]))]
        return None

    def _learn(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        with unset_fake_temporarily():
            flat = torch.zeros(storage.nbytes() // tensor.element_size(), dtype=tensor.dtype)
            flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(values)
        key = id(storage)

        def died(gone: Any) -> None:
            if self._known.get(key, (None, None))[0] is gone:
                del self._known[key]

        self._known[key] = (weakref.ref(storage, died), flat)


def _filled(tensor: torch.Tensor, *, value: bool) -> torch.Tensor:
    with unset_fake_temporarily():
        return torch.full(tuple(tensor.shape), value, dtype=tensor.dtype)


def _device(tensor: torch.Tensor) -> str:
    # `tensor.device` of a fake tensor is an operator.
    return tensor.fake_device.type if isinstance(tensor, FakeTensor) else tensor.device.type


def _is_small(tensor: torch.Tensor) -> bool:
    """Return whether the values of a tensor like this are followed."""
    if tensor.dtype.is_complex or _device(tensor) not in ("cpu", "cuda"):
        return False
    return tensor.numel() <= (_MOST_NUMBERS if tensor.dtype.is_floating_point else _MOST_ELEMENTS)


def _is_drawn(tensor: torch.Tensor) -> bool:
    """Return whether random values are unknown: a GPU has a generator of its own, and many numbers are weights."""
    return _device(tensor) != "cpu" or (tensor.dtype.is_floating_point and tensor.numel() > 1)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Return whether the tensor covers its whole storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _shares(outputs: Sequence[torch.Tensor], inputs: Sequence[Any]) -> bool:
    """Return whether the operator made a view, whose storage is known or unknown already."""
    storages = {id(tensor.untyped_storage()) for tensor in inputs if isinstance(tensor, FakeTensor)}
    return any(id(tensor.untyped_storage()) in storages for tensor in outputs)


@functools.cache
def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _changed(func: Any, args: Any, kwargs: Any) -> list[FakeTensor]:
    """Return the fake tensors that the operator writes to."""
    if not func._schema.is_mutable:
        return []
    given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    names = [part.name for part in func._schema.arguments if part.alias_info is not None and part.alias_info.is_write]
    return [value for value in tree_leaves([given.get(name) for name in names]) if isinstance(value, FakeTensor)]
