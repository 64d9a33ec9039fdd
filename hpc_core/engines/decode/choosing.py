"""From logits to the next token, on the device: greedy or sampled, ends respected, answers and counters kept. Nothing waits for the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["PAD_ID", "Chooser", "Sampling"]

PAD_ID = 0
"""What a row that has ended goes on with."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedy where `temperature` is None."""

    temperature: float | None = None
    top_k: int | None = None
    seed: int = 0


class Chooser:
    """Chooses a token for each row and remembers it. Every tensor is made once, so that its work can be captured."""

    def __init__(self, batch: int, most: int, device: torch.device, sampling: Sampling, ends: tuple[int, ...] | None):
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        """The tokens chosen last, (batch,): the next step's input."""
        self.answers = torch.full((batch, most), PAD_ID, dtype=torch.long, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self._count = torch.zeros(1, dtype=torch.long, device=device)
        self._sampling = sampling
        self._ends = None if ends is None else torch.tensor(ends, dtype=torch.long, device=device)
        self.generator = None if sampling.temperature is None else torch.Generator(device=device)

    def begin(self, query: int) -> None:
        """Forget the query before; query number `query` draws the same in every run."""
        self.ended.zero_()
        self._count.zero_()
        if self.generator is not None:
            self.generator.manual_seed(self._sampling.seed * 1_000_003 + query)

    def __call__(self, logits: torch.Tensor) -> None:
        """Choose by (batch, vocabulary) logits: into `tokens`, and into the next column of `answers`."""
        chosen = self._drawn(logits) if self.generator is not None else logits.argmax(dim=-1)
        if self._ends is not None:
            chosen = torch.where(self.ended, PAD_ID, chosen)
            self.ended |= torch.isin(chosen, self._ends)
        self.tokens.copy_(chosen)
        self.answers.index_copy_(1, self._count, chosen[:, None])
        self._count += 1

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """By exponential races: the smallest of e_i / p_i is i with probability p_i; no sort, no wait."""
        assert self._sampling.temperature is not None
        scaled = logits.float() / self._sampling.temperature
        if self._sampling.top_k is not None:
            least = scaled.topk(self._sampling.top_k, dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        races = torch.empty_like(scaled).exponential_(generator=self.generator)
        return (scaled.softmax(dim=-1) / races).argmax(dim=-1)
