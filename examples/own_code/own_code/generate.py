"""Generation: the likeliest byte, again and again, with a cache of keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from own_code.model import Cache, Decoder

__all__ = ["make_step"]


def make_step(device: str, prompt: int = 16, new_tokens: int = 8, batch: int = 1) -> Callable[[], torch.Tensor]:
    """One call answers a random prompt with `new_tokens` bytes."""
    torch.manual_seed(0)
    model = Decoder().to(device).eval()
    ids = torch.randint(0, 256, (batch, prompt)).to(device)

    @torch.no_grad()
    def step() -> torch.Tensor:
        caches: list[Cache] = [[] for _ in model.blocks]
        answer, entered = ids, ids
        for _ in range(new_tokens):
            logits = model(entered, caches, start=answer.shape[1] - entered.shape[1])
            entered = logits[:, -1:].argmax(-1)
            answer = torch.cat([answer, entered], dim=1)
        return answer

    return step
