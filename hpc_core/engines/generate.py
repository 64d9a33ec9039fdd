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
    """A streamer that marks when each token reaches the host.

    `generate` hands over the prompt first, then every token after copying it to the host, so the device has finished it.
    """

    def __init__(self, on_token: Any):
        self._on_token = on_token
        self._seen = 0

    def put(self, tokens: torch.Tensor) -> None:
        """One batch of tokens; the first call is the prompt itself."""
        if self._seen:
            self._on_token(self._seen)
        self._seen += 1

    def end(self) -> None:
        """Nothing follows."""


class AskedInChat:
    """A tokenizer that puts each text where the model's chat template has the user's words: an instruct model answers those."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def encode(self, text: str, /) -> list[int]:
        """Ids of the whole exchange up to where the model's turn begins."""
        message = [{"role": "user", "content": text}]
        ids: list[int] = self._tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        return ids


class GenerateProgram:
    """Answers prompt after prompt; query i is `prompts[i % period]`."""

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
        """Tokens after which something outside ends a query, as a prediction does; None: after `new_tokens`."""
        self.on_token: Any = None
        """Called with 1, 2, … as each new token reaches the host; None leaves `generate` without a streamer."""
        self.cache: Any = None
        """The KV cache where the program has one of its own; None where `generate` makes one."""
        self.owned: dict[str, list[torch.Tensor]] = {}
        """Tensors of the program's own, by category of memory."""
        self.captured: Any = None
        """Our CUDA graph that a token replays; None where there is none."""
        # Exactly N tokens without an extra kernel a token: no end-of-sequence token, hence nothing to suppress.
        generation = getattr(built.model, "generation_config")  # noqa: B009
        generation.eos_token_id = None
        generation.pad_token_id = 0

    @property
    def compiled(self) -> bool:
        """Whether transformers compiles the forward of a token: with a static cache, on a GPU."""
        return self.workload.cache == "static" and self.workload.compiled and self.device.type == "cuda"

    @property
    def hidden_bytes(self) -> int:
        """Memory that each query takes and the allocator's counters do not show: that of captured graphs."""
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
        """One query: prefill and `new_tokens` tokens; ids of prompt and answer are left in `output`, (batch, length).

        Raises:
            MeasureError: another number of tokens came out.
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
        came = self.output.shape[1] - inputs["input_ids"].shape[1]
        wanted = self.new_tokens if self.ended_after is None else self.ended_after
        if came != wanted:
            raise MeasureError(f"generate gave {came} new tokens, asked for exactly {wanted}.")

    def _watcher(self, mark: Mark) -> Any:
        def watch(count: int) -> None:
            if count == 1:
                mark("decode")
            if self.on_token is not None:
                self.on_token(count)

        return watch

    def answer_ids(self) -> list[list[int]]:
        """The new tokens of the last query."""
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
        """Return the logits that an engine's own forward chose `given` by, after prompt `index`; None: the model's forward did.

        Args:
            index: of the prompt.
            given: tokens after it, (batch, tokens).
            rows: of the batch, the first so many are wanted.

        Returns:
            (rows, tokens, vocabulary) in float32.
        """
        return None

    def facts(self, found: Findings | None = None) -> Findings:
        """Return whether a compiled forward was compiled; hooks on the model see everything else."""
        if not self.compiled:
            return Findings()
        return Findings(facts={"compiled": Fact(asked=True, seen=compiled_graphs() > 0)})

    def counters(self, found: Findings) -> Findings:
        """Return what the graphs of a compiled forward hold; instruments count everything else."""
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
        """Nothing outlives the last query."""


def prompts_for(built: Built, workload: GenerateSpec) -> list[PromptBatch]:
    """The prompts of a generation case, texts through the model's tokenizer and chat template.

    Raises:
        DataError: the data has fewer prompts than asked for.
    """
    text = workload.data.source in ("embedded", "hub", "file")
    tokenizer = AskedInChat(built.tokenizer) if getattr(built.tokenizer, "chat_template", None) else built.tokenizer
    return prompt_batches(workload, vocab_size=built.vocab_size, tokenizer=tokenizer if text else None)


def generate_program(
    built: Built, workload: GenerateSpec, kind: type[GenerateProgram] = GenerateProgram
) -> GenerateProgram:
    """Return the program of a generation case, of this kind: prompts on the device, nothing run yet.

    Raises:
        DataError: the data has fewer prompts than asked for.
    """
    return kind(built, workload, prompts_for(built, workload))


class GenerationEngine(Engine):
    """Base of engines that generate: a new one names itself, and its program, a `GenerateProgram` with a `step` of its own."""

    workloads = frozenset({"generate"})
    program: ClassVar[type[GenerateProgram]] = GenerateProgram

    def load(self, case: Case, device: torch.device, built: Built | None) -> GenerateProgram:
        """Put the prompts on the device; nothing is run yet.

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
        """A compiled forward has no model on fake tensors."""
        workload = case.workload
        assert isinstance(workload, GenerateSpec)
        if workload.cache == "static" and workload.compiled:
            return (
                f"{case.id}: transformers compiles the forward for a static cache on a GPU, and torch.compile cannot "
                "be predicted. Predict it with compiled=False, or with cache='dynamic', whose memory is that of the same tokens."
            )
        return None
