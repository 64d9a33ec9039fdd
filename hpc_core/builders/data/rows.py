"""Token rows and prompt batches: what a workload's data is made of before it becomes tensors, and the random numbers behind them.

The same seed gives the same numbers on every machine (numpy's PCG64). numpy is imported on first use, so that reading texts needs the
standard library alone.

Ids below 3 are special: 0 pads, 1 begins a sequence (BOS), 2 ends one. Random ids are never special, except that a trace row begins
with BOS, because its recorded length counts one.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import psutil

from hpc_core.builders.data.texts import texts
from hpc_core.case.errors import DataError, MissingLibraryError
from hpc_core.case.lengths import recorded_lengths
from hpc_core.case.parts import DataSpec
from hpc_core.case.workloads import GenerateSpec
from hpc_core.record.units import quantity

if TYPE_CHECKING:
    from numpy.random import Generator


FIRST_FREE_ID = 3
"""Ids 0, 1 and 2 are padding, BOS and EOS. Random and byte-level ids start here."""

_SHUFFLE_STREAM = 1
"""Mixed into the seed of shuffling, so that the order does not use the numbers that the ids were drawn from."""

_TOKEN_BYTES = 56
"""A token of a random row, on the host: 40 as an integer in a list, the rest for the lists that batches are cut from (measured: 53)."""

_T = TypeVar("_T")


def _generator(entropy: list[int]) -> Generator:
    if entropy[0] < 0:
        raise DataError(f"A data seed must be 0 or above, got {entropy[0]}: use DataSpec(seed={-entropy[0]}).")
    try:
        from numpy.random import PCG64, Generator, SeedSequence
    except ImportError as error:
        raise MissingLibraryError(
            "Random token ids and shuffling need numpy, which is not installed: pip install 'hpc-core[run]'."
        ) from error
    # A one-element list is the same entropy as the plain integer: PCG64(seed).
    return Generator(PCG64(SeedSequence(entropy)))


class IdSource:
    """Draws token ids from [3, vocab_size), row by row, so that fewer rows are a prefix of more rows."""

    def __init__(self, seed: int, vocab_size: int) -> None:
        """Start the stream of this seed.

        Raises:
            DataError: the vocabulary has no id outside the special ones, or the seed is negative.
            MissingLibraryError: numpy is absent.
        """
        if vocab_size <= FIRST_FREE_ID:
            raise DataError(
                f"A vocabulary of {vocab_size} ids has none to draw: ids 0 to {FIRST_FREE_ID - 1} are special. "
                f"Use a model with vocab_size of at least {FIRST_FREE_ID + 1}."
            )
        self._vocab_size = vocab_size
        self._numbers = _generator([seed])

    def row(self, length: int) -> list[int]:
        """The next `length` token ids."""
        ids: list[int] = self._numbers.integers(FIRST_FREE_ID, self._vocab_size, size=length).tolist()
        return ids


def shuffled(items: list[_T], seed: int) -> list[_T]:
    """Return a new list with the same items, shuffled with this seed.

    Raises:
        DataError: the seed is negative.
        MissingLibraryError: numpy is absent.
    """
    order: list[int] = _generator([seed, _SHUFFLE_STREAM]).permutation(len(items)).tolist()
    return [items[index] for index in order]


PAD_ID = 0
BOS_ID = 1


class Tokenizer(Protocol):
    """Anything that turns a text into token ids, such as the tokenizers of `transformers`."""

    def encode(self, text: str, /) -> list[int]:
        """Return the ids of a text, with the special tokens that the tokenizer adds."""
        ...


class ByteTokenizer:
    """Replaces a missing tokenizer: BOS, then 3 + byte for each byte of the text's UTF-8.

    Rows are three to five times as long as a real tokenizer's, so their lengths say nothing about a data set. An
    empty text is one token long, as with Llama's tokenizer. Needs a vocabulary of at least `VOCAB_SIZE` ids.
    """

    VOCAB_SIZE = FIRST_FREE_ID + 256

    def encode(self, text: str, /) -> list[int]:
        """Return BOS and one id in [3, 259) for each byte. A lone surrogate, which UTF-8 cannot encode, becomes "?"."""
        return [BOS_ID, *(FIRST_FREE_ID + byte for byte in text.encode("utf-8", errors="replace"))]


class PromptBatch(msgspec.Struct, frozen=True):
    """Prompts that are generated from together, as one batch."""

    ids: list[list[int]]
    """Rows of equal length, padded with 0 on the left, because generation continues on the right."""
    mask: list[list[int]] | None
    """1 at real tokens, 0 at padding; None without padding."""
    tokens: int
    """Real tokens."""
    padded: int
    """Padding tokens."""


def token_rows(
    data: DataSpec, *, count: int | None, length: int | None, vocab_size: int, tokenizer: Tokenizer | None
) -> list[list[int]]:
    """Return rows of token ids, in the order of the data.

    Args:
        data: the source. random draws ids, trace draws ids at recorded lengths, the others are texts to be tokenized.
        count: how many rows; None takes `data.rows`, or all if that is None too (random data needs a count).
        length: tokens per row for random data; otherwise the maximum, and longer rows are cut.
        vocab_size: ids lie below it.
        tokenizer: for texts; None takes `ByteTokenizer`. Random ids and traces need none.

    Fewer rows are a prefix of more rows. With a tokenizer that adds no BOS, empty rows have no token.

    Raises:
        DataError: fewer rows than requested, no count or length for random data, ids outside the vocabulary, or
            texts that cannot be read (see `texts`).
        MissingLibraryError: numpy or `datasets` is needed and absent.
    """
    for name, value in (("count", count), ("length", length)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, got {value}.")
    if data.source == "random":
        return _random_rows(data, count, length, vocab_size)
    if data.source == "trace":
        recorded = list(recorded_lengths(data.name or ""))
        wanted = recorded[: _how_many(data, count, len(recorded))]
        source = IdSource(data.seed, vocab_size)
        # Cut after drawing, so that a row's ids do not depend on where the rows before it were cut.
        return [[BOS_ID, *source.row(tokens - 1)][:length] for tokens in wanted]
    return _text_rows(data, count, length, vocab_size, tokenizer)


def prompt_batches(spec: GenerateSpec, *, vocab_size: int, tokenizer: Tokenizer | None) -> list[PromptBatch]:
    """Return `spec.prompts` batches of `spec.batch` prompts, in the order of the data, padded with 0 on the left.

    Raises:
        DataError: fewer prompts than prompts x batch, a prompt without any token, or see `token_rows`.
        MissingLibraryError: numpy or `datasets` is needed and absent.
    """
    rows = token_rows(
        spec.data,
        count=spec.prompts * spec.batch,
        length=spec.prompt_length,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )
    for number, row in enumerate(rows):
        if not row:
            raise DataError(
                f"Prompt {number} of {spec.data.name!r} has no token, so there is nothing to continue: "
                "remove the empty rows from the data, or use a tokenizer that adds BOS."
            )
    return [_prompt_batch(rows[start : start + spec.batch]) for start in range(0, len(rows), spec.batch)]


def _how_many(data: DataSpec, count: int | None, available: int) -> int:
    """Return how many of the available rows to take. `data.rows` is the user's limit."""
    if data.rows is not None and data.rows > available:
        raise DataError(
            f"{data.rows} rows were asked of {data.name!r} ({data.source}), which has {available}: "
            f"use rows={available} or fewer, or omit rows to take all."
        )
    limit = available if data.rows is None else data.rows
    if count is None:
        return limit
    if count > limit:
        reason = "which has" if data.rows is None else "which is limited by rows= to"
        raise DataError(
            f"{count} rows are needed of {data.name or 'random ids'!r} ({data.source}), {reason} {limit}: "
            "use fewer batches, a smaller batch or more rows."
        )
    return count


def _random_rows(data: DataSpec, count: int | None, length: int | None, vocab_size: int) -> list[list[int]]:
    if length is None:
        raise DataError("Random rows have no length: give length=, the tokens in each row.")
    wanted = count if count is not None else data.rows
    if wanted is None:
        raise DataError("Random rows have no end: give count=, or DataSpec(rows=...).")
    wanted = _how_many(data, wanted, wanted if data.rows is None else data.rows)
    _check_room(wanted, length)
    source = IdSource(data.seed, vocab_size)
    return [source.row(length) for _ in range(wanted)]


def _check_room(count: int, length: int) -> None:
    needed, free = count * length * _TOKEN_BYTES, _free_bytes()
    if needed > free:
        raise DataError(
            f"{count:,} random rows of {length:,} tokens need about {quantity(needed, 'bytes')} of the host's memory, and "
            f"{quantity(free, 'bytes')} are free: use shorter rows, a smaller batch or fewer batches."
        )


def _free_bytes() -> int:
    """Return what this host, or its container, has left."""
    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counted["inactive_file"]))
    return free


def _text_rows(
    data: DataSpec, count: int | None, length: int | None, vocab_size: int, tokenizer: Tokenizer | None
) -> list[list[int]]:
    if tokenizer is None and vocab_size < ByteTokenizer.VOCAB_SIZE:
        raise DataError(
            f"Without a tokenizer texts become bytes, which need {ByteTokenizer.VOCAB_SIZE} ids; the model has "
            f"{vocab_size}. Give a tokenizer, or use data with source='random' or 'trace'."
        )
    encoder = ByteTokenizer() if tokenizer is None else tokenizer
    found = texts(data)
    rows = [list(encoder.encode(text))[:length] for text in found[: _how_many(data, count, len(found))]]
    for number, row in enumerate(rows):
        if row and not 0 <= min(row) <= max(row) < vocab_size:
            wrong = next(token for token in row if not 0 <= token < vocab_size)
            raise DataError(
                f"Row {number} of {data.name!r} holds token id {wrong}, the model knows 0 to {vocab_size - 1}: "
                "use the tokenizer that belongs to the model."
            )
    return rows


def _prompt_batch(rows: list[list[int]]) -> PromptBatch:
    width = max(map(len, rows))
    tokens = sum(map(len, rows))
    padded = width * len(rows) - tokens
    ids = [[PAD_ID] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows] if padded else None
    return PromptBatch(ids=ids, mask=mask, tokens=tokens, padded=padded)
