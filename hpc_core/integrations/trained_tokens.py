"""Tokens that a model is trained on, padding apart, counted as they enter it. Waits for no device before the training has ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class TrainedTokens:
    """A hook before the model's forward: counts `input_ids`, and on the device what `attention_mask` leaves in."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.positions = 0
        """Tokens with padding, of all forwards in training."""
        self.uncounted = 0
        """Forwards in training whose input was not understood; then `unpadded` says nothing."""
        self._full = 0
        self._masked: torch.Tensor | None = None
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def stop(self) -> None:
        """Take the hook off. May be called again."""
        self._handle.remove()

    def unpadded(self) -> int:
        """Tokens that are no padding; waits for the device."""
        return self._full + (0 if self._masked is None else int(self._masked.item()))

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return  # an evaluation
        ids = named.get("input_ids", args[0] if args else None)
        mask = named.get("attention_mask")
        if not isinstance(ids, torch.Tensor) or (mask is not None and getattr(mask, "shape", None) != ids.shape):
            self.uncounted += 1
            return
        self.positions += ids.numel()
        if mask is None:
            self._full += ids.numel()
            return
        with torch.no_grad():
            kept = torch.count_nonzero(mask)
            self._masked = kept if self._masked is None else self._masked.add_(kept)
