"""Generation by transformers' own `generate`: the stock engine, and the base of other engines' programs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from hpc_core.builders.assemble import Built
from hpc_core.builders.data.rows import PromptBatch, prompt_batches
from hpc_core.case.case import Case
from hpc_core.case.errors import MeasureError
from hpc_core.case.workloads import GenerateSpec
from hpc_core.engines.capture import unused_pool_bytes
from hpc_core.engines.engine import Engine
from hpc_core.instruments.counters import compiled_graphs, without_compiling
from hpc_core.instruments.program import Mark, unmarked
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric
from hpc_core.record.record import Fact

BUSY_TOKENS = 16
"""Decoded tokens under the profiler; it keeps every launch of every token."""
COUNTED_TOKENS = 4
"""Decoded tokens whose operators are counted."""


class TokenTimes:
    """A streamer that reports when each token reaches the host.

    `generate` first passes the prompt, then every token after copying it to the host, so the device has finished it.
    """

    def __init__(self, on_token: Any):
        self._on_token = on_token
        self._calls = 0

    def put(self, tokens: torch.Tensor) -> None:
        """Receive one batch of tokens; the first call has the prompt."""
        if self._calls:
            self._on_token(self._calls)
        self._calls += 1

    def end(self) -> None:
        """Do nothing at the end of the answer."""


class ChatTokenizer:
    """A tokenizer that applies the model's chat template, with each text as the user's message."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def encode(self, text: str, /) -> list[int]:
        """Return the ids of the conversation up to the beginning of the model's answer."""
        message = [{"role": "user", "content": text}]
        ids: list[int] = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids


class GenerateProgram:
    """Answer prompt after prompt; query i is `prompts[i % period]`."""

    phases: tuple[str, ...] = ("prefill", "decode")

    def __init__(self, built: Built, workload: GenerateSpec, prompts: list[PromptBatch]):
        self.model: Any = built.model
        self.workload = workload
        self.device = built.device
        self.prompts = prompts
        self.period = len(prompts)
        self.inputs = [self._inputs(prompt) for prompt in prompts]
        self.output: torch.Tensor | None = None
        self.steps_done = 0
        self.new_tokens = workload.new_tokens
        self.ended_after: int | None = None
        """Tokens after which a prediction ends a query; None: after `new_tokens`."""
        self.on_token: Any = None
        """Called with 1, 2, … as each new token reaches the host; None uses no streamer."""
        self.cache: Any = None
        """The program's own KV cache; None if `generate` makes one."""
        self.owned: dict[str, list[torch.Tensor]] = {}
        """Tensors that the program itself owns, by category of memory."""
        self.captured: Any = None
        """Our CUDA graph that a token replays; None if there is none."""
        # Without an end-of-sequence token, `generate` makes exactly N tokens and needs no kernel to suppress it.
        generation = getattr(built.model, "generation_config")  # noqa: B009
        generation.eos_token_id = None
        generation.pad_token_id = 0

    @property
    def compiled(self) -> bool:
        """True if transformers compiles the forward of a token: with a static cache, on a GPU."""
        return self.workload.cache == "static" and self.workload.compiled and self.device.type == "cuda"

    @property
    def hidden_bytes(self) -> int:
        """Memory of captured graphs, which each query uses and the allocator's counters do not show."""
        return unused_pool_bytes() if self.compiled else 0

    def _inputs(self, prompt: PromptBatch) -> dict[str, torch.Tensor]:
        ids = torch.tensor(prompt.ids, dtype=torch.long, device=self.device)
        mask = (
            torch.ones_like(ids)
            if prompt.mask is None
            else torch.tensor(prompt.mask, dtype=torch.long, device=self.device)
        )
        return {"input_ids": ids, "attention_mask": mask}

    def step(self, mark: Mark = unmarked) -> None:
        """Run one query, prefill and `new_tokens` tokens; store the ids of prompt and answer in `output`, (batch, length).

        Raises:
            MeasureError: `generate` returned another number of tokens.
        """
        inputs = self.inputs[self.steps_done % self.period]
        mark("prefill")
        options: dict[str, Any] = {
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "use_cache": self.workload.cache != "off",
        }
        if self.workload.cache == "static":
            options["cache_implementation"] = "static"
            options["disable_compile"] = not self.workload.compiled
        if mark is not unmarked or self.on_token is not None:
            options["streamer"] = TokenTimes(self._watcher(mark))
        self.output = self.model.generate(**inputs, **options)
        self.steps_done += 1
        received = self.output.shape[1] - inputs["input_ids"].shape[1]
        expected = self.new_tokens if self.ended_after is None else self.ended_after
        if received != expected:
            raise MeasureError(f"generate returned {received} new tokens; the query needs exactly {expected}.")

    def _watcher(self, mark: Mark) -> Any:
        def watch(count: int) -> None:
            if count == 1:
                mark("decode")
            if self.on_token is not None:
                self.on_token(count)

        return watch

    def answer_ids(self) -> list[list[int]]:
        """Return the new tokens of the last query."""
        assert self.output is not None
        return self.output[:, -self.new_tokens :].tolist()

    @property
    def longest(self) -> int:
        """Index of the longest prompt."""
        return max(range(self.period), key=lambda index: len(self.prompts[index].ids[0]))

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest row, the answer included."""
        return len(self.prompts[self.longest].ids[0]) + self.new_tokens

    def logits_after(self, index: int, given: torch.Tensor, rows: int) -> torch.Tensor | None:
        """Return the logits from which an engine's own forward chose `given` after prompt `index`; None if the model's forward did.

        Args:
            index: index of the prompt.
            given: tokens after it, (batch, tokens).
            rows: how many of the batch's first rows to return.

        Returns:
            (rows, tokens, vocabulary) in float32.
        """
        return None

    def facts(self, found: Findings | None = None) -> Findings:
        """Return whether a forward was compiled as asked; hooks on the model observe everything else."""
        if not self.compiled:
            return Findings()
        return Findings(facts={"compiled": Fact(asked=True, seen=compiled_graphs() > 0)})

    def counters(self, found: Findings) -> Findings:
        """Return the memory of a compiled forward's graphs; instruments count everything else."""
        if not self.compiled:
            return Findings()
        note = "of a compiled token's graphs; part of every peak"
        return Findings(
            metrics={"graph_pool_bytes": metric("graph_pool_bytes", self.hidden_bytes, on_gpu=True, note=note)}
        )

    @contextlib.contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run every query in the block operator by operator, so that single allocations can be recorded."""
        with without_compiling():
            yield

    def close(self) -> None:
        """Do nothing: there is nothing to release."""


def prompts_for(built: Built, workload: GenerateSpec) -> list[PromptBatch]:
    """Return the prompts of a generation case; texts go through the model's tokenizer and chat template.

    Raises:
        DataError: the data has fewer prompts than asked for.
    """
    text = workload.data.source in ("embedded", "hub", "file")
    tokenizer = ChatTokenizer(built.tokenizer) if getattr(built.tokenizer, "chat_template", None) else built.tokenizer
    return prompt_batches(workload, vocab_size=built.vocab_size, tokenizer=tokenizer if text else None)


def generate_program(
    built: Built, workload: GenerateSpec, kind: type[GenerateProgram] = GenerateProgram
) -> GenerateProgram:
    """Return the program of a generation case, with its prompts on the device, before any query.

    Raises:
        DataError: the data has fewer prompts than asked for.
    """
    return kind(built, workload, prompts_for(built, workload))


class GenerationEngine(Engine):
    """Base class of generation engines. A subclass sets `name`, and `program` to a `GenerateProgram` with its own `step`."""

    workloads = frozenset({"generate"})
    program: ClassVar[type[GenerateProgram]] = GenerateProgram

    def load(self, case: Case, device: torch.device, built: Built | None) -> GenerateProgram:
        """Put the prompts on the device without running a query.

        Raises:
            DataError: the data has fewer prompts than asked for.
        """
        assert built is not None
        assert isinstance(case.workload, GenerateSpec)
        return generate_program(built, case.workload, self.program)


class StockGeneration(GenerationEngine):
    """transformers' `generate`."""

    name = "stock"

    def unpredictable(self, case: Case) -> str | None:
        """Return why a case with a compiled forward cannot be predicted."""
        workload = case.workload
        assert isinstance(workload, GenerateSpec)
        if workload.cache == "static" and workload.compiled:
            return (
                f"{case.id}: transformers compiles the forward for a static cache on a GPU, and torch.compile cannot "
                "be predicted. Predict it with compiled=False, or with cache='dynamic', whose memory is that of the same tokens."
            )
        return None
