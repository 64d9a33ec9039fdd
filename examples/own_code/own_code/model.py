"""The model: a small decoder with tied embeddings, and a cache of keys and values for generation."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["Cache", "Decoder"]

Cache = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (batch, heads, length, head width)."""


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, cache: Cache | None) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:
            if cached := cache.pop(0) if cache else None:
                k, v = torch.cat([cached[0], k], dim=2), torch.cat([cached[1], v], dim=2)
            cache.append((k, v))
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norm_mlp(x))))


class Decoder(nn.Module):
    """Logits for the next byte."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 128, vocabulary: int = 256):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, caches: list[Cache] | None = None, start: int = 0) -> torch.Tensor:
        """(batch, length) ids to (batch, length, vocabulary) logits; `caches` has one list a layer, and grows."""
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.position(positions)
        for index, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[index])
        return self.head(self.norm(x))
