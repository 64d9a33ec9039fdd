"""Fine-tuning as a plain loop over collated batches: forward, backward, optimizer, zero_grad.

No Trainer, no hooks, and no synchronization inside a step: the loss stays on the device until it is read.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from hpc_core.builders.assemble import Built
from hpc_core.builders.data.batching import (
    Batch,
    BlockSource,
    EpochSize,
    batches,
    epoch_size,
)
from hpc_core.builders.data.cache import cached_epoch
from hpc_core.builders.data.device_batches import Batches, DeviceBatch, Resident
from hpc_core.builders.data.fetched import FetchedEpoch
from hpc_core.builders.data.loader import Fed
from hpc_core.builders.data.rows import token_rows
from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError, library
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.engines.engine import Engine
from hpc_core.instruments.program import Mark, unmarked
from hpc_core.record.findings import Findings


class FinetuneProgram:
    """Train step by step; batch i is `batches[i % period]`, so that every pass has the same work."""

    phases: tuple[str, ...] = ("forward", "backward", "optimizer")
    first_steps = 0
    """Number of first steps that compile, tune or capture."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Batches,
        epoch: EpochSize,
        precision: str,
    ):
        self.model = model
        self.optimizer = optimizer
        self.batches = data
        self.epoch = epoch
        widths = [data.size(index).width for index in range(len(data))]
        self.period = 1 if len(set(widths)) == 1 else len(data)
        self.widest = max(range(len(data)), key=widths.__getitem__)
        """Index of the batch that needs the most memory."""
        self.most_tokens = max(widths)
        """Tokens of the longest row, padding included."""
        self.loss: torch.Tensor | None = None
        self.steps_done = 0
        self._autocast = precision == "autocast-bf16"
        self._device_type = next(model.parameters()).device.type

    def step(self, mark: Mark = unmarked) -> None:
        """Run one optimizer step, and store the batch's loss in `loss`, on the device."""
        self.train_on(self.batches.take(self.steps_done), mark)
        self.batches.taken()
        self.steps_done += 1

    def go_to(self, index: int) -> None:
        """Continue with the batch at this index, and start to fetch it if necessary."""
        self.steps_done = index
        self.batches.go_to(index)

    def train_on(self, batch: DeviceBatch, mark: Mark = unmarked) -> None:
        """Run forward, backward and optimizer step on this batch."""
        mark("forward")
        context = torch.autocast(self._device_type, torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with context:
            # Keep only the loss: the logits are the largest activation and must be freed.
            loss = self.model(input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask).loss
        mark("backward")
        loss.backward()
        mark("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    captured: Any = None
    """The CUDA graph that a step replays; None if it runs operator by operator."""

    @property
    def recomputed_attentions(self) -> int | None:
        """The number of layers whose attention a step recomputes to stay within a memory budget; None without a budget."""
        return None

    def facts(self, found: Findings | None = None) -> Findings:
        """Return no facts: hooks on the model observe what runs."""
        return Findings()

    def counters(self, found: Findings) -> Findings:
        """Return nothing: instruments count everything."""
        return Findings()

    def close(self) -> None:
        """End a loader's workers."""
        self.batches.clear()

    @contextlib.contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run every step in the block operator by operator, without prefetching, so that it can be observed."""
        with self.batches.by_index():
            yield

    def release(self) -> None:
        """Free batches, gradients, loss and optimizer state; the program cannot train afterwards."""
        self.batches.clear()
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = None

    def tokens_of(self, steps: int) -> int:
        """Return the unpadded tokens of `steps` steps from the first batch on."""
        return sum(self.batches.size(index % len(self.batches)).tokens for index in range(steps))

    def padded_of(self, steps: int) -> int:
        """Return the padding tokens of `steps` steps from the first batch on."""
        return sum(self.batches.size(index % len(self.batches)).padded for index in range(steps))


class TrainingEngine(Engine):
    """Base class of fine-tuning engines. A subclass sets `name`, and `program` to a `FinetuneProgram` with its own step."""

    workloads = frozenset({"finetune"})
    program: ClassVar[type[FinetuneProgram]] = FinetuneProgram

    def load(self, case: Case, device: torch.device, built: Built | None) -> FinetuneProgram:
        """Prepare data and optimizer without running a step. Raises the errors of `finetune_program`."""
        assert built is not None
        assert isinstance(case.workload, FinetuneSpec)
        return finetune_program(built, case, case.workload, self.program)


class StockTraining(TrainingEngine):
    """The libraries' own forward, loss and optimizer."""

    name = "stock"

    def unpredictable(self, case: Case) -> str | None:
        """Return why a case with a loader cannot be predicted."""
        return fed_case(case)


def fed_case(case: Case) -> str | None:
    """Return why a case whose batches are fed cannot be predicted; None if its batches are on the device."""
    assert isinstance(case.workload, FinetuneSpec)
    feed = case.workload.feed
    return None if feed.way == "resident" else unpredictable_switch(case.id, "feed", feed, "batches from a loader")


def unpredictable_switch(case_id: str, name: str, value: object, what: str) -> str:
    """Return the message that a field of the workload cannot be predicted."""
    return (
        f"{case_id}: {what} cannot be predicted ({name}={value!r}); measure it on a GPU, or predict it without {name}."
    )


def finetune_program(
    built: Built, case: Case, workload: FinetuneSpec, kind: type[FinetuneProgram] = FinetuneProgram
) -> FinetuneProgram:
    """Return the program of a fine-tuning case, with its data and optimizer, before any step.

    Raises:
        DataError: too few rows for one batch.
        BuildError: nothing is trainable.
        MissingLibraryError: the optimizer's package is not installed.
    """
    data: Batches
    data, epoch = resident_batches(built, workload) if workload.feed.way == "resident" else fed_batches(built, workload)
    trainable = [parameter for parameter in built.model.parameters() if parameter.requires_grad]
    if not trainable:
        raise BuildError(
            f"{case.id} trains nothing: no parameter requires a gradient. Give an adapter or unquantized weights."
        )
    optimizer = make_optimizer(workload, trainable)
    return kind(built.model, optimizer, data, epoch, workload.precision)


def resident_batches(built: Built, workload: FinetuneSpec) -> tuple[Resident, EpochSize]:
    """Return the workload's batches, at most `steps`, collated and on the device, whatever its feed.

    Raises:
        DataError: too few rows for one batch.
    """
    rows = token_rows(
        workload.data,
        count=_row_count(workload),
        # Packing joins whole rows; everything else cuts them at the length.
        length=None if workload.packing else workload.length,
        vocab_size=built.vocab_size,
        tokenizer=_tokenizer(built, workload.data),
    )
    chosen = itertools.islice(batches(rows, workload), workload.steps)
    return Resident(_to_device(batch, built.device) for batch in chosen), epoch_size(rows, workload)


def fed_batches(built: Built, workload: FinetuneSpec) -> tuple[Fed, EpochSize]:
    """Return the same batches, fed one by one as the workload's feed asks.

    Raises:
        DataError: too few rows for one batch, no texts or tokenizer where the feed needs them, or a cache that cannot be written.
    """
    count, tokenizer = _row_count(workload), _tokenizer(built, workload.data)
    source: BlockSource
    if workload.feed.tokenize == "fetch":
        source = FetchedEpoch(workload, count=count, vocab_size=built.vocab_size, tokenizer=tokenizer)
        note = "texts are tokenized when their batch is requested"
    else:
        source, how = cached_epoch(workload, count=count, vocab_size=built.vocab_size, tokenizer=tokenizer)
        note = f"the cached epoch was {how}"
    chosen = min(workload.steps, len(source.sizes))
    return Fed(source, workload.feed, chosen, built.device, note), source.epoch


def _row_count(workload: FinetuneSpec) -> int | None:
    """Return how many rows to read: as many as the steps need of random data, else the whole data set, which defines an epoch."""
    return workload.batch * workload.steps if workload.data.source == "random" else workload.data.rows


def _tokenizer(built: Built, data: DataSpec) -> Any | None:
    return built.tokenizer if data.source in ("embedded", "hub", "file") else None


def _to_device(batch: Batch, device: torch.device) -> DeviceBatch:
    def tensor(rows: Any) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.long, device=device)

    return DeviceBatch(
        ids=tensor(batch.ids),
        labels=tensor(batch.labels),
        mask=None if batch.mask is None else tensor(batch.mask),
        tokens=batch.tokens,
        padded=batch.padded,
    )


def make_optimizer(workload: FinetuneSpec, trainable: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer that the case names, for these parameters.

    Raises:
        MissingLibraryError: an 8-bit or paged optimizer without bitsandbytes.
    """
    rate = workload.learning_rate
    if workload.optimizer == "adamw-fused":
        return torch.optim.AdamW(trainable, lr=rate, fused=True)
    if workload.optimizer == "adamw-foreach":
        return torch.optim.AdamW(trainable, lr=rate, foreach=True)
    bnb = library("bitsandbytes", f"The optimizer {workload.optimizer}")
    kind = bnb.optim.AdamW8bit if workload.optimizer == "adamw-8bit" else bnb.optim.PagedAdamW8bit
    optimizer = kind(trainable, lr=rate)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer
