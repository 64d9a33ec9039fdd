"""The policy for values of fake tensors: what Python gets when it reads one.

The code under test must take the branch that it takes on real data. A step reads only two values: whether a mask hides anything,
and whether generation is finished. The program knows the first; `predict.generate` counts tokens for the second.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

_CARRIES = {
    *("_to_copy", "cat", "eq", "ne", "sum", "all", "ones_like", "clone"),
    *("bitwise_and", "logical_and", "bitwise_not", "constant_pad_nd"),
}
"""Operators whose output is a mask if an input is one. Views share the storage of the mask."""
_WIDENS = "constant_pad_nd"
"""transformers pads a static cache's mask with zeros up to the cache's length."""


class ValuePolicy:
    """Track which storages come from a padding mask, and whether that mask is full."""

    def __init__(self) -> None:
        self.mask_is_full = True
        self._masks: dict[int, weakref.ref[Any]] = {}
        self._alls: dict[int, weakref.ref[Any]] = {}
        self._open: dict[int, weakref.ref[Any]] = {}
        """Masks padded with zeros, and masks derived from a whole padded mask. They are never full."""

    def know(self, masks: Iterable[torch.Tensor], *, full: bool) -> None:
        """Register padding masks. `full` means that they hide nothing."""
        self.mask_is_full = full
        for mask in masks:
            _note(self._masks, mask)

    def follow(self, name: str, inputs: Iterable[Any], outputs: Iterable[torch.Tensor]) -> None:
        """Record an operator: outputs of a mask are masks, and results of `all` are remembered."""
        if name not in _CARRIES:
            return
        masks = [value for value in inputs if isinstance(value, torch.Tensor) and _noted(self._masks, value)]
        widened = name == _WIDENS or any(_noted(self._open, mask) and _is_whole(mask) for mask in masks)
        for output in outputs:
            if masks:
                _note(self._masks, output)
                if widened:
                    _note(self._open, output)
            elif name == "all":
                _note(self._alls, output)

    def scalar(self, tensor: torch.Tensor) -> bool | int | float:
        """Return the value of a scalar: the truth for masks, True for any other `all` (positions are in order), else zero or one."""
        if tensor.dtype == torch.bool:
            if _noted(self._open, tensor):
                return False
            return self.mask_is_full if _noted(self._masks, tensor) else _noted(self._alls, tensor)
        return 1.0 if tensor.dtype.is_floating_point else 0


def _is_whole(tensor: torch.Tensor) -> bool:
    """Return whether the tensor covers its whole storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _note(known: dict[int, weakref.ref[Any]], tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    known[id(storage)] = weakref.ref(storage)


def _noted(known: dict[int, weakref.ref[Any]], tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    found = known.get(id(storage))
    return found is not None and found() is storage
