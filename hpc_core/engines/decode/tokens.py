"""From logits to the next token, and the first token of each prompt. Everything stays on the device; nothing waits for the host.

The first token is prefill, head and choice. On a GPU each prompt gets a CUDA graph for it, where launching would take longer than running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as hooks

from hpc_core.engines.capture import Captured, captured, forget_workspaces
from hpc_core.engines.decode.cache import StaticKeyValues
from hpc_core.engines.decode.model import Decoder, kind_of
from hpc_core.engines.decode.prefill import Prefill, at_module

PAD_ID = 0
"""The token of a row that has already ended."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedy if `temperature` is None."""

    temperature: float | None = None
    top_k: int | None = None
    seed: int = 0


class Chooser:
    """Choose a token for each row and store it. Every tensor is allocated once, so that the work can be captured."""

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
        """Begin query number `query`, which draws the same numbers in every run."""
        self.ended.zero_()
        self._count.zero_()
        if self.generator is not None:
            self.generator.manual_seed(self._sampling.seed * 1_000_003 + query)

    def __call__(self, logits: torch.Tensor) -> None:
        """Choose by logits (batch, vocabulary); store into `tokens` and into the next column of `answers`."""
        chosen = self._drawn(logits) if self.generator is not None else logits.argmax(dim=-1)
        if self._ends is not None:
            chosen = torch.where(self.ended, PAD_ID, chosen)
            self.ended |= torch.isin(chosen, self._ends)
        self.tokens.copy_(chosen)
        self.answers.index_copy_(1, self._count, chosen[:, None])
        self._count += 1

    def _drawn(self, logits: torch.Tensor) -> torch.Tensor:
        """Draw by exponential races: e_i / p_i is the smallest with probability p_i. This needs no sort and no wait."""
        assert self._sampling.temperature is not None
        scaled = logits.float() / self._sampling.temperature
        if self._sampling.top_k is not None:
            least = scaled.topk(self._sampling.top_k, dim=-1).values[:, -1:]
            scaled = scaled.masked_fill(scaled < least, float("-inf"))
        races = torch.empty_like(scaled).exponential_(generator=self.generator)
        return (scaled.softmax(dim=-1) / races).argmax(dim=-1)


_MOST_PROMPTS = 8
"""At most so many prompts get graphs. The driver keeps about 3 kB for each launch, outside torch's allocator: 30 MiB for 4-bit weights and a batch."""
_LONG_PART_TOKENS, _LONG_PART_TOKENS_IN_FOUR_BITS = 2048, 4096
"""A part of so many tokens keeps a GPU busy for as long as the host takes to launch it, and a graph's memory grows with the tokens. 4-bit weights are
multiplied in pieces, which takes more launches."""


class FirstTokens:
    """Fill the cache from one of the prompts and choose the token after it."""

    def __init__(
        self,
        decoder: Decoder,
        cache: StaticKeyValues,
        prefill: Prefill,
        chooser: Chooser,
        prompts: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        logits: torch.Tensor,
    ):
        """Prepare for `prompts`: ids (batch, width), and the mask if a row is padded. Replays read them in place."""
        self._cache = cache
        self._prefill = prefill
        self._chooser = chooser
        self._prompts = prompts
        self._head = decoder.head
        # A plain head multiplies into the buffer itself; other heads return a tensor, which is copied.
        self._head_transposed = decoder.head.weight.detach().t() if kind_of(decoder.head) == "plain" else None
        self.logits = logits
        """(batch, vocabulary) logits of the last query's first token, until its next token is computed."""
        self._graphs: dict[int, Captured] = {}
        self._long = _LONG_PART_TOKENS_IN_FOUR_BITS if decoder.four_bit else _LONG_PART_TOKENS
        self.replayed: set[int] = set()
        """Prompts whose first token was a replay at least once."""

    @property
    def hidden_bytes(self) -> int:
        """Bytes that replays use and the allocator's counters do not show. The graphs share memory, since no two run at the same time."""
        return max((graph.hidden_bytes for graph in self._graphs.values()), default=0)

    @property
    def worth_capturing(self) -> bool:
        """True if prompts get graphs on a GPU: few prompts, with parts that take longer to launch than to run."""
        return not self.why_not

    @property
    def why_not(self) -> str:
        """Why prefills get no graph even on a GPU; "" if they do."""
        tokens = self._prefill.rows_at_once * max(ids.shape[1] for ids, _ in self._prompts)
        if len(self._prompts) > _MOST_PROMPTS:
            return f"{len(self._prompts)} prompts, at most {_MOST_PROMPTS} get graphs"
        return f"parts of {tokens} tokens, from {self._long} on a GPU is busy without" if tokens >= self._long else ""

    @property
    def all_replayed(self) -> bool:
        """True if every prompt's first token has been a replay."""
        return len(self.replayed) == len(self._prompts)

    def capture(self, *, before: Callable[[], None], pool: Any) -> None:
        """Capture one graph for each prompt in this pool, if that is worth it; `before` restores what choosing a token changes."""
        if not self.worth_capturing:
            return
        for index in range(len(self._prompts)):
            self._graphs[index] = captured(
                lambda index=index: self._run(index),  # type: ignore[misc]
                self.logits.device,
                before=before,
                generator=self._chooser.generator,
                pool=pool,
            )

    def __call__(self, index: int, *, watched: bool) -> None:
        """Choose the first token after this prompt; operator by operator if `watched`, or under a dispatch mode or global forward hooks."""
        graph = None if watched or _followed() else self._graphs.get(index)
        if graph is None:
            self._run(index)
            return
        forget_workspaces()  # products since the last query made some, and the graph has its own
        graph()
        self.replayed.add(index)
        self._cache.length = self._prompts[index][0].shape[1]

    def _run(self, index: int) -> None:
        last = self._prefill(*self._prompts[index])
        if self._head_transposed is None:
            self.logits.copy_(self._head(last))
        else:
            with at_module(self._head):
                torch.mm(last, self._head_transposed, out=self.logits)
        self._chooser(self.logits)


def _followed() -> bool:
    modes: Any = torch._C
    whole: Any = hooks
    return bool(modes._len_torch_dispatch_stack() or whole._global_forward_hooks or whole._global_forward_pre_hooks)
