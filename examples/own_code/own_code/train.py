"""Training: what a user's script does, as a factory that returns one step of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from own_code.model import Decoder

__all__ = ["make_step"]


def make_step(
    device: str, batch: int = 8, length: int = 64, width: int = 64, layers: int = 2, heads: int = 4
) -> Callable[[], torch.Tensor]:
    """One step of training on random bytes. `device` is filled in by whoever measures: "cpu" or "cuda"."""
    torch.manual_seed(0)
    model = Decoder(width, layers, heads, context=length).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(0, 256, (batch, length + 1)).to(device)

    def step() -> torch.Tensor:
        logits = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
