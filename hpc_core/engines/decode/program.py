"""The graph engine: generation with a static cache, one captured step per token, and no wait for the host between tokens.

Without CUDA the same step runs eagerly in plain torch; then `captured` is None and `why_eager` is the reason.
"""

from __future__ import annotations

import importlib.util
import time
from collections import deque
from typing import Any

import torch

from hpc_core.builders.assemble import Built
from hpc_core.builders.data.rows import PromptBatch
from hpc_core.case.errors import MeasureError, MissingLibraryError, SpecError
from hpc_core.case.workloads import GenerateSpec
from hpc_core.engines.capture import Captured, captured
from hpc_core.engines.decode.cache import StaticKeyValues, capacity_for
from hpc_core.engines.decode.model import Decoder, decoder_of, int8_rows
from hpc_core.engines.decode.plain_step import PlainStep
from hpc_core.engines.decode.prefill import Prefill
from hpc_core.engines.decode.tokens import Chooser, FirstTokens, Sampling
from hpc_core.engines.generate import GenerateProgram, prompts_for
from hpc_core.instruments.program import Mark, unmarked

_IN_FLIGHT = 2
"""Tokens that may be queued while the host waits for an earlier one, so that the device is never idle."""


class Int8Head:
    """The head with int8 rows in plain torch, for the paths without our own kernels."""

    def __init__(self, weight: torch.Tensor):
        self.codes, self.scales = int8_rows(weight)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) of hidden states (batch, hidden)."""
        products = hidden @ self.codes.to(hidden.dtype).T
        return (products.float() * self.scales).to(hidden.dtype)


class GraphProgram(GenerateProgram):
    """Answer prompt after prompt like `GenerateProgram`, with its own step."""

    watched = False
    """True while an instrument records single allocations; first tokens are then not replayed."""

    @torch.no_grad()  # what is made of the weights here is not to be trained
    def __init__(self, built: Built, workload: GenerateSpec, prompts: list[PromptBatch], seed: int = 0):
        self.decoder: Decoder = decoder_of(built.model, _ends_of(built.model, workload))
        super().__init__(built, workload, prompts)
        # The last token is never fed back, so it needs no place in the cache.
        longest = max(len(prompt.ids[0]) for prompt in prompts) + workload.new_tokens - 1
        self.cache = StaticKeyValues(self.decoder, workload.batch, capacity_for(longest, workload.cache_step))
        self._turns = self.decoder.turns(self.cache.capacity)
        on_gpu = self.device.type == "cuda"
        self.why_eager = None if on_gpu else "no CUDA on this device: the step runs eagerly in plain torch"
        sampling = Sampling(workload.temperature, workload.top_k, seed)
        ends = None if workload.eos_every is None else self.decoder.ends
        self.chooser = Chooser(workload.batch, workload.new_tokens, self.device, sampling, ends)
        self.captured: Captured | None = None
        self.chosen_blocks: dict[str, str] = {}
        self.first_use_s: dict[str, float] = {}
        self.replays = 0
        """The number of steps in the last query, replayed or eager."""
        self.step_of: Any = self._step(on_gpu)
        prefill = Prefill(self.decoder, self.cache, self._turns, self.step_of.between())
        inputs = [
            (each["input_ids"], each["attention_mask"] if prompt.padded else None)
            for each, prompt in zip(self.inputs, self.prompts, strict=True)
        ]
        self.first_tokens = FirstTokens(
            self.decoder, self.cache, prefill, self.chooser, inputs, self.step_of.logits_buffer()
        )
        self._logits: torch.Tensor | None = None
        self.owned = {"kv_cache": [self.cache.whole], "weights": self.step_of.owned_weights()}
        self._prepare(on_gpu)

    def _step(self, on_gpu: bool) -> Any:
        kernels = self.workload.kernels if on_gpu else "torch"
        if kernels == "triton" and self.decoder.int4:
            raise SpecError(
                "kernels='triton' has no product for torchao's int4 weights: say kernels='inductor' or 'torch'."
            )
        if kernels == "triton":
            if importlib.util.find_spec("triton") is None:
                raise MissingLibraryError(
                    "engine='graph' with kernels='triton' needs the package triton, which comes with torch's CUDA builds. "
                    "Get it with: pip install triton, or say kernels='torch'."
                )
            from hpc_core.engines.decode.kernel_step import KernelStep

            return KernelStep(self.decoder, self.cache, self._turns, int8_head=self.workload.head == "int8")
        if kernels == "inductor" and self.decoder.four_bit:
            raise SpecError(
                "kernels='inductor' compiles plain layers and int4 ones; this model's are in bitsandbytes' 4 bits: say kernels='triton' or 'torch'."
            )
        head = Int8Head(self.decoder.head.weight) if self.workload.head == "int8" else self.decoder.head
        return PlainStep(self.decoder, self.cache, self._turns, head, eager=not on_gpu, compiled=kernels == "inductor")

    def _prepare(self, on_gpu: bool) -> None:
        """Choose block sizes and capture the step; `first_use_s` has the seconds of each."""
        if not on_gpu:
            return
        with torch.no_grad():
            start = time.perf_counter()
            self.chosen_blocks = self.step_of.settle()
            torch.cuda.synchronize(self.device)
            tuned = time.perf_counter()
            # A token and a prefill never run at once, so they share a pool; `_logits`, which the step returns, stays allocated.
            pool: Any = torch.cuda.graph_pool_handle()
            generator = self.chooser.generator
            self.captured = captured(self._decode, self.device, before=self._rewind, generator=generator, pool=pool)
            self.first_tokens.capture(before=self._rewind, pool=pool)
            torch.cuda.synchronize(self.device)
        self.first_use_s = {"tune": tuned - start, "capture": time.perf_counter() - tuned}

    @property
    def hidden_bytes(self) -> int:
        """The larger of the graphs' pools: a token and a prefill never run at once."""
        return 0 if self.captured is None else max(self.captured.hidden_bytes, self.first_tokens.hidden_bytes)

    def _rewind(self) -> None:
        self.cache.begin(1, None)
        self.chooser.begin(0)

    def _decode(self) -> None:
        """Decode one token. This work is captured."""
        self._logits = self.step_of(self.chooser.tokens)
        self.chooser(self._logits)
        self.cache.filled += 1

    def _advance(self) -> None:
        if self.captured is None:
            self._decode()
        else:
            self.captured()
        self.cache.length += 1
        self.replays += 1

    def step(self, mark: Mark = unmarked) -> None:
        """Answer one query: prefill and `new_tokens` tokens, or fewer if every row has ended and `eos_every` is set.

        Raises:
            MeasureError: the query gave another number of tokens.
        """
        index = self.steps_done % self.period
        with torch.no_grad():
            mark("prefill")
            self._begin(index)
            arrivals = _Arrivals(self) if self.on_token is not None else None
            mark("decode")
            count = 1
            if arrivals is not None:
                arrivals.launched()
            while count < self.new_tokens and not self._all_ended(count):
                self._advance()
                count += 1
                if arrivals is not None:
                    arrivals.launched()
            if arrivals is not None:
                arrivals.finish()
            self.output = torch.cat([self.inputs[index]["input_ids"], self.chooser.answers[:, :count]], dim=1)
        self.steps_done += 1
        if count != self.new_tokens and self.workload.eos_every is None:
            raise MeasureError(f"The engine returned {count} new tokens; the query needs exactly {self.new_tokens}.")

    def _begin(self, index: int) -> None:
        """Run the prefill and choose the first token."""
        self.replays = 0
        self.chooser.begin(index)
        self.first_tokens(index, watched=self.watched)

    def _all_ended(self, count: int) -> bool:
        every = self.workload.eos_every
        return every is not None and count % every == 0 and bool(self.chooser.ended.all())

    def answer_ids(self) -> list[list[int]]:
        """Return the new tokens of the last query, each row up to its end token if `eos_every` is set."""
        assert self.output is not None
        width = self.inputs[(self.steps_done - 1) % self.period]["input_ids"].shape[1]
        rows: list[list[int]] = self.output[:, width:].tolist()
        if self.workload.eos_every is None:
            return rows
        ends = [next((at for at, token in enumerate(row) if token in self.decoder.ends), len(row)) for row in rows]
        return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]

    def logits_after(self, index: int, given: torch.Tensor, rows: int) -> torch.Tensor:
        """Return the engine's float32 logits for the first `rows` rows of `given` (batch, tokens): (rows, tokens, vocabulary).

        They are the prefill's logits, which choose the first token, and those after each token of `given` but the last.
        """
        logits = []
        with torch.no_grad():
            self._begin(index)
            logits.append(self.first_tokens.logits[:rows].to(torch.float32, copy=True))
            for at in range(given.shape[1] - 1):
                self.chooser.tokens.copy_(given[:, at])
                self._advance()
                assert self._logits is not None
                logits.append(self._logits[:rows].to(torch.float32, copy=True))
        return torch.stack(logits, dim=1)


class _Arrivals:
    """Report each token when it has reached the host, while the device decodes the next one."""

    def __init__(self, program: GraphProgram):
        self._program = program
        self._waiting: deque[tuple[int, Any]] = deque()
        self._count = 0
        on_gpu = program.device.type == "cuda"
        self._host = torch.empty(program.chooser.answers.T.shape, dtype=torch.long, pin_memory=on_gpu)

    def launched(self) -> None:
        """Queue a copy to the host behind the token that was just launched."""
        self._host[self._count].copy_(self._program.chooser.tokens, non_blocking=True)
        self._count += 1
        event = None
        if self._program.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((self._count, event))
        while len(self._waiting) >= _IN_FLIGHT or (event is None and self._waiting):
            self._report()

    def _report(self) -> None:
        count, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        self._program.on_token(count)

    def finish(self) -> None:
        """Wait for all other tokens."""
        while self._waiting:
            self._report()


def _ends_of(model: Any, workload: GenerateSpec) -> tuple[int, ...]:
    """Return ids of end tokens, from the generation configuration or the model's.

    Raises:
        SpecError: `eos_every` is set and there are none.
    """
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        ends = getattr(holder, "eos_token_id", None)
        if ends is not None:
            return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
    if workload.eos_every is not None:
        raise SpecError(f"eos_every={workload.eos_every}: this model names no token that ends a sequence; drop it.")
    return ()


def graph_program(built: Built, workload: GenerateSpec, *, seed: int = 0) -> GraphProgram:
    """Return the engine's program for a generation case, with its cache allocated and its step captured on a GPU.

    Raises:
        DataError: the data has fewer prompts than requested.
        SpecError: the engine does not support the model.
        MissingLibraryError: kernels='triton' needs triton, which is not installed.
    """
    return GraphProgram(built, workload, prompts_for(built, workload), seed)
