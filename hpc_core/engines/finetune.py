"""Fine-tuning as a plain loop over collated batches: forward, backward, optimizer, zero_grad.

No Trainer, no hooks, no synchronization inside a step: the loss stays on the device until somebody asks.
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
    """Trains step by step; batch i is `batches[i % period]`, so that every pass sees the same work."""

    phases: tuple[str, ...] = ("forward", "backward", "optimizer")
    first_steps = 0
    """So many steps at the beginning differ from all others: they compile, tune or capture. None do here."""

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
        """One optimizer step; the loss of the batch is left in `loss`, on the device."""
        self.train_on(self.batches.take(self.steps_done), mark)
        self.batches.taken()
        self.steps_done += 1

    def go_to(self, index: int) -> None:
        """Go on with the batch at this index; one that must be fetched is on its way when this returns."""
        self.steps_done = index
        self.batches.go_to(index)

    def train_on(self, batch: DeviceBatch, mark: Mark = unmarked) -> None:
        """Forward, backward and optimizer step on this batch."""
        mark("forward")
        context = torch.autocast(self._device_type, torch.bfloat16) if self._autocast else contextlib.nullcontext()
        with context:
            # Only the loss is kept: the logits are the largest activation and must be free to go.
            loss = self.model(input_ids=batch.ids, labels=batch.labels, attention_mask=batch.mask).loss
        mark("backward")
        loss.backward()
        mark("optimizer")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()

    captured: Any = None
    """The CUDA graph that a step replays; None where it runs operator by operator."""

    @property
    def recomputed_attentions(self) -> int | None:
        """How many layers' attentions a step computes again to stay within a memory budget; None without one."""
        return None

    def facts(self, found: Findings | None = None) -> Findings:
        """Nothing: hooks on the model see what runs."""
        return Findings()

    def counters(self, found: Findings) -> Findings:
        """Nothing beyond what instruments count."""
        return Findings()

    def close(self) -> None:
        """End a loader's workers."""
        self.batches.clear()

    @contextlib.contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Run every step in the block operator by operator, and fetch nothing ahead, so that it can be watched."""
        with self.batches.by_index():
            yield

    def release(self) -> None:
        """Let go of batches, gradients, loss and optimizer state: nothing is trained after it."""
        self.batches.clear()
        self.optimizer.state.clear()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = None

    def tokens_of(self, steps: int) -> int:
        """Unpadded tokens of `steps` steps, counted from the first batch."""
        return sum(self.batches.size(index % len(self.batches)).tokens for index in range(steps))

    def padded_of(self, steps: int) -> int:
        """Padding tokens of `steps` steps, counted from the first batch."""
        return sum(self.batches.size(index % len(self.batches)).padded for index in range(steps))


class TrainingEngine(Engine):
    """Base of engines that fine-tune: a new one names itself, and its program, a `FinetuneProgram` with a step of its own."""

    workloads = frozenset({"finetune"})
    program: ClassVar[type[FinetuneProgram]] = FinetuneProgram

    def load(self, case: Case, device: torch.device, built: Built | None) -> FinetuneProgram:
        """Put the data on the device or on its way, and make the optimizer; nothing is run yet. Raises as `finetune_program`."""
        assert built is not None
        assert isinstance(case.workload, FinetuneSpec)
        return finetune_program(built, case, case.workload, self.program)


class StockTraining(TrainingEngine):
    """The libraries' own forward, loss and optimizer."""

    name = "stock"

    def unpredictable(self, case: Case) -> str | None:
        """Batches that a loader brings have no model on fake tensors."""
        return fed_case(case)


def fed_case(case: Case) -> str | None:
    """Return why a case whose batches are fed cannot be predicted; None where they lie on the device."""
    assert isinstance(case.workload, FinetuneSpec)
    feed = case.workload.feed
    return (
        None if feed.way == "resident" else unpredictable_switch(case.id, "feed", feed, "what a loader brings and when")
    )


def unpredictable_switch(case_id: str, name: str, value: object, what: str) -> str:
    """Say that a field of the workload, by its name and value, has no model."""
    return (
        f"{case_id}: {what} cannot be predicted ({name}={value!r}); measure it on a GPU, or predict it without {name}."
    )


def finetune_program(
    built: Built, case: Case, workload: FinetuneSpec, kind: type[FinetuneProgram] = FinetuneProgram
) -> FinetuneProgram:
    """Return the program of a fine-tuning case, of this kind: data on the device or on its way, optimizer made, nothing run yet.

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
    """The workload's batches, at most `steps`, collated from rows and all on the device, whatever its feed says.

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
    """The same batches, brought one by one as the workload's feed says.

    Raises:
        DataError: too few rows for one batch, texts or tokenizer that the feed cannot do with, or a cache that cannot be written.
    """
    count, tokenizer = _row_count(workload), _tokenizer(built, workload.data)
    source: BlockSource
    if workload.feed.tokenize == "fetch":
        source = FetchedEpoch(workload, count=count, vocab_size=built.vocab_size, tokenizer=tokenizer)
        note = "texts are tokenized when their batch is asked for"
    else:
        source, how = cached_epoch(workload, count=count, vocab_size=built.vocab_size, tokenizer=tokenizer)
        note = f"the cached epoch was {how}"
    chosen = min(workload.steps, len(source.sizes))
    return Fed(source, workload.feed, chosen, built.device, note), source.epoch


def _row_count(workload: FinetuneSpec) -> int | None:
    """A random row is as good as another; a data set is read whole, so that an epoch's size is its own."""
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
    """The optimizer that the case names, over these parameters.

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
