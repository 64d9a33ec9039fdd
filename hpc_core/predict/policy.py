"""What a fake tensor answers when Python asks for its value: the code under test must take the way that it takes on real data.

Only two questions are asked on the way of a step: whether a mask leaves everything in, and whether generation is done. The
program knows the first, and `fake.generation` counts for the second.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["Answers"]

_CARRIES = {
    *("_to_copy", "cat", "eq", "ne", "sum", "all", "ones_like", "clone"),
    *("bitwise_and", "logical_and", "bitwise_not", "constant_pad_nd"),
}
"""Operators through which what is known of a mask goes on; views share its storage."""
_WIDENS = "constant_pad_nd"
"""transformers pads a static cache's mask with zeros up to the cache's length."""


class Answers:
    """Knows which storages stem from a padding mask, and whether that mask is full."""

    def __init__(self) -> None:
        self.mask_is_full = True
        self._masks: dict[int, weakref.ref[Any]] = {}
        self._alls: dict[int, weakref.ref[Any]] = {}
        self._open: dict[int, weakref.ref[Any]] = {}
        """Masks widened by zeros, and what was made of such a mask as a whole: never full, though their parts are alike."""

    def know(self, masks: Iterable[torch.Tensor], *, full: bool) -> None:
        """These tensors are padding masks; `full`: nothing in them is padding."""
        self.mask_is_full = full
        for mask in masks:
            _note(self._masks, mask)

    def follow(self, name: str, inputs: Iterable[Any], outputs: Iterable[torch.Tensor]) -> None:
        """An operator has run: what came from a mask is of a mask, and the outcome of `all` is remembered."""
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
        """The value that Python gets: of a mask the truth; of any other `all` yes, as for positions that are in order."""
        if tensor.dtype == torch.bool:
            if _noted(self._open, tensor):
                return False
            return self.mask_is_full if _noted(self._masks, tensor) else _noted(self._alls, tensor)
        return 1.0 if tensor.dtype.is_floating_point else 0


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether it shows all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _note(known: dict[int, weakref.ref[Any]], tensor: torch.Tensor) -> None:
    storage = tensor.untyped_storage()
    known[id(storage)] = weakref.ref(storage)


def _noted(known: dict[int, weakref.ref[Any]], tensor: torch.Tensor) -> bool:
    storage = tensor.untyped_storage()
    found = known.get(id(storage))
    return found is not None and found() is storage
