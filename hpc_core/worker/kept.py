"""Trained weights put back, for what trains on beside the measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["kept", "weights_kept"]


def kept(part: torch.Tensor) -> torch.Tensor:
    """A copy on the device where twice its size is free there, so that putting it back waits for nothing; else on the host."""
    if part.is_cuda and torch.cuda.mem_get_info(part.device)[0] < 2 * part.nbytes:
        return part.detach().cpu()
    return part.detach().clone()


@contextlib.contextmanager
def weights_kept(model: torch.nn.Module) -> Iterator[None]:
    """After the block every weight that is trained holds what it held before, at the same address."""
    trained = [part for part in model.parameters() if part.requires_grad]
    before = [kept(part) for part in trained]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in zip(trained, before, strict=True):
                part.copy_(value)
