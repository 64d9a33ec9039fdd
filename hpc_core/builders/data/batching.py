"""Training batches from token rows: unpadded, padded to the longest, padded to a maximum, or packed.

All kinds count real and padding tokens separately, because a time per epoch means nothing without them. Works on lists of ids; no tensors.

Rows of every source except random are shuffled by `data.seed` first. Rows left over at the end that fill no batch are dropped, and so
are the tokens that fill no block when packing.

Padded batches keep short rows, even empty ones (a third of wikitext's), with two exceptions. A batch in which every row has fewer than
2 tokens predicts nothing, so its mean loss would be 0/0 = NaN: it is skipped, and counted. A row without any token (from a tokenizer
that adds no BOS) has nothing to attend to, so its softmax would be NaN: it is left out before batches are formed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from hpc_core.builders.data.rows import PAD_ID, shuffled
from hpc_core.case.errors import DataError
from hpc_core.case.workloads import FinetuneSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

IGNORED_LABEL = -100
"""The label that a cross-entropy loss ignores."""


class Batch(msgspec.Struct, frozen=True):
    """`spec.batch` rows of equal length, as the model takes them. The model shifts the labels itself."""

    ids: list[list[int]]
    mask: list[list[int]] | None
    """1 at real tokens, 0 at padding on the right; None for unpadded and packed rows."""
    labels: list[list[int]]
    """The ids, with -100 in place of padding."""
    tokens: int
    """Real tokens."""
    padded: int
    """Padding tokens."""


class EpochSize(msgspec.Struct, frozen=True):
    """One pass over the rows, in counts."""

    rows: int
    """Rows given, including those left out or dropped."""
    batches: int
    """Batches that `batches` yields."""
    tokens: int
    """Real tokens in these batches."""
    padded: int
    """Padding tokens in these batches."""
    skipped: int
    """Batches skipped because no row in them has a next token to predict."""


def batches(rows: list[list[int]], spec: FinetuneSpec) -> Iterator[Batch]:
    """Return an iterator over one epoch of training batches. Each is built on request; all errors are raised before the first.

    padding="none": rows must be `spec.length` long. "longest": rows are cut to `spec.length` and padded to the longest
    of their batch; the mask is given even where that pads nothing. "max_length": cut and padded to `spec.length`.
    packing: all rows are joined in shuffled order, uncut, and divided into full blocks of `spec.length`. Blocks cross
    the borders of rows, and attention is not masked between the documents in a block.

    Raises:
        DataError: an unpadded row of another length, or too few rows or tokens for a single batch.
        MissingLibraryError: rows must be shuffled and numpy is absent.
    """
    if spec.packing:
        return _packed(rows, spec)
    groups, _ = _groups(rows, spec)
    return (_batch(group, spec) for group in groups)


def epoch_size(rows: list[list[int]], spec: FinetuneSpec) -> EpochSize:
    """Return the size of what `batches` yields, without building it.

    Raises:
        DataError: as `batches`.
        MissingLibraryError: as `batches`.
    """
    if spec.packing:
        count = _packed_batches(rows, spec)
        return EpochSize(rows=len(rows), batches=count, tokens=count * spec.batch * spec.length, padded=0, skipped=0)
    groups, skipped = _groups(rows, spec)
    tokens = sum(len(row) for group in groups for row in group)
    places = sum(_width(group, spec) * len(group) for group in groups)
    return EpochSize(rows=len(rows), batches=len(groups), tokens=tokens, padded=places - tokens, skipped=skipped)


def _ordered(rows: list[list[int]], spec: FinetuneSpec) -> list[list[int]]:
    """Return the rows in the order of the epoch. Random rows are not shuffled."""
    return rows if spec.data.source == "random" else shuffled(rows, spec.data.seed)


def _groups(rows: list[list[int]], spec: FinetuneSpec) -> tuple[list[list[list[int]]], int]:
    """Return the rows of each batch, cut but not padded, and the number of skipped batches."""
    if spec.padding == "none":
        _check_lengths(rows, spec)
    usable = [row[: spec.length] for row in _ordered([row for row in rows if row], spec)]
    ends = range(spec.batch, len(usable) + 1, spec.batch)
    groups = [usable[end - spec.batch : end] for end in ends]
    if not groups:
        left_out = len(rows) - len(usable)
        note = f" and {left_out} without any token" if left_out else ""
        raise DataError(
            f"A batch needs {spec.batch} rows, the data has {len(usable)}{note}: "
            f"give {spec.batch - len(usable)} more rows, or a batch of at most {max(len(usable), 1)}."
        )
    kept = [group for group in groups if max(map(len, group)) >= 2]
    if not kept:
        raise DataError(
            f"No row of {len(groups)} batches has 2 tokens, so there is no next token to learn: give longer rows."
        )
    return kept, len(groups) - len(kept)


def _check_lengths(rows: list[list[int]], spec: FinetuneSpec) -> None:
    for number, row in enumerate(rows):
        if len(row) != spec.length:
            raise DataError(
                f"Row {number} has {len(row)} tokens, unpadded batches need exactly {spec.length}: "
                "give rows of that length, or use padding='longest' or padding='max_length'."
            )


def _width(group: list[list[int]], spec: FinetuneSpec) -> int:
    return spec.length if spec.padding == "max_length" else max(map(len, group))


def _batch(group: list[list[int]], spec: FinetuneSpec) -> Batch:
    width = _width(group, spec)
    tokens = sum(map(len, group))
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in group]
    return Batch(
        ids=[row + [PAD_ID] * (width - len(row)) for row in group],
        mask=None if spec.padding == "none" else mask,
        labels=[row + [IGNORED_LABEL] * (width - len(row)) for row in group],
        tokens=tokens,
        padded=width * len(group) - tokens,
    )


def _packed_batches(rows: list[list[int]], spec: FinetuneSpec) -> int:
    tokens = sum(map(len, rows))
    needed = spec.batch * spec.length
    if tokens < needed:
        raise DataError(
            f"A packed batch needs {spec.batch} blocks of {spec.length} = {needed} tokens, the {len(rows)} rows hold "
            f"{tokens}: give more rows, a smaller batch or a smaller length."
        )
    return tokens // needed


def _packed(rows: list[list[int]], spec: FinetuneSpec) -> Iterator[Batch]:
    count = _packed_batches(rows, spec)
    stream = [token for row in _ordered(rows, spec) for token in row]
    return (_packed_batch(stream, number, spec) for number in range(count))


def _packed_batch(stream: list[int], number: int, spec: FinetuneSpec) -> Batch:
    first = number * spec.batch
    blocks = [stream[block * spec.length : (block + 1) * spec.length] for block in range(first, first + spec.batch)]
    # Labels are separate lists, so that masking some of them does not change the ids.
    return Batch(
        ids=blocks, mask=None, labels=[list(block) for block in blocks], tokens=spec.batch * spec.length, padded=0
    )


class Block(NamedTuple):
    """One batch."""

    ids: Ids
    """(batch, width), padded with 0 on the right."""
    lengths: Ids
    """(batch,): real tokens of each row."""


class BlockSize(NamedTuple):
    """The size of a batch, known without making it."""

    width: int
    """Tokens per row, padding included."""
    tokens: int
    """Real tokens."""
    padded: int
    """Padding tokens."""


class BlockSource(Protocol):
    """The batches of an epoch in order, by index. Can be pickled for worker processes."""

    tokenize: str
    """"cached" or "fetch", as in FeedSpec."""
    masked: bool
    """True if the model gets a mask."""
    epoch: EpochSize
    sizes: list[BlockSize]
    """One per batch of the epoch."""

    def block(self, index: int) -> Block:
        """Make or read the batch at this index."""
        ...
