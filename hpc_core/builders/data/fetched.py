"""Batches whose texts are tokenized on request: the same batches as `batching.batches`, one at a time by index.

The rows of a batch depend on the token count of every row, so all rows are counted once at the start.
"""

from __future__ import annotations

import itertools

import numpy as np

from hpc_core.builders.data.batching import Block, BlockSize, EpochSize, epoch_size
from hpc_core.builders.data.rows import (
    PAD_ID,
    ByteTokenizer,
    Tokenizer,
    shuffled,
    token_rows,
)
from hpc_core.builders.data.texts import texts
from hpc_core.case.errors import DataError
from hpc_core.case.workloads import FinetuneSpec


class FetchedEpoch:
    """The texts of a workload's data, and which of them each batch needs. A BlockSource."""

    tokenize = "fetch"

    def __init__(self, workload: FinetuneSpec, *, count: int | None, vocab_size: int, tokenizer: Tokenizer | None):
        """Count the tokens of every row.

        Raises:
            DataError: the data has no texts, or cannot make one batch.
        """
        if workload.data.source in ("random", "trace"):
            raise DataError(
                f"tokenize='fetch' needs texts, and source={workload.data.source!r} has none: use tokenize='cached' or source='embedded'."
            )
        self._workload = workload
        self._encoder: Tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        cut = None if workload.packing else workload.length
        rows = token_rows(workload.data, count=count, length=cut, vocab_size=vocab_size, tokenizer=tokenizer)
        self.epoch: EpochSize = epoch_size(rows, workload)
        self.masked = workload.padding != "none"
        counts = [len(row) for row in rows]
        wanted = range(len(rows)) if workload.packing else [number for number, tokens in enumerate(counts) if tokens]
        order = shuffled(list(wanted), workload.data.seed)
        found = texts(workload.data)
        self._texts = [found[number] for number in order]
        self._counts = [counts[number] for number in order]
        self._ends = list(itertools.accumulate(self._counts))
        self._firsts = self._first_rows()
        self.sizes = [self._size(index) for index in range(len(self._firsts))]

    def block(self, index: int) -> Block:
        """Tokenize and return the batch at this index.

        Raises:
            IndexError: there is no such batch.
        """
        first, spec = self._firsts[index], self._workload
        if spec.packing:
            return self._packed(index, first)
        rows = [self._encoded(number)[: spec.length] for number in range(first, first + spec.batch)]
        width = self.sizes[index].width
        ids = np.full((spec.batch, width), PAD_ID, dtype=np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        return Block(ids, np.array([len(row) for row in rows], dtype=np.int64))

    def _packed(self, index: int, first: int) -> Block:
        spec = self._workload
        area = spec.batch * spec.length
        begin = index * area - (self._ends[first] - self._counts[first])
        stream: list[int] = []
        for number in itertools.count(first):
            if len(stream) >= begin + area:
                break
            stream += self._encoded(number)
        ids = np.array(stream[begin : begin + area], dtype=np.int64).reshape(spec.batch, spec.length)
        return Block(ids, np.full(spec.batch, spec.length, dtype=np.int64))

    def _encoded(self, number: int) -> list[int]:
        return list(self._encoder.encode(self._texts[number]))

    def _first_rows(self) -> list[int]:
        """Return the row in which each batch begins."""
        spec = self._workload
        if spec.packing:
            begins = np.arange(self.epoch.batches) * spec.batch * spec.length
            firsts: list[int] = np.searchsorted(self._ends, begins, side="right").tolist()
            return firsts
        firsts = list(range(0, len(self._counts) - spec.batch + 1, spec.batch))
        # As in batching, a batch without any next token is skipped.
        return [first for first in firsts if max(self._counts[first : first + spec.batch]) >= 2]

    def _size(self, index: int) -> BlockSize:
        spec, first = self._workload, self._firsts[index]
        if spec.packing:
            return BlockSize(spec.length, spec.batch * spec.length, 0)
        counts = self._counts[first : first + spec.batch]
        width = spec.length if spec.padding == "max_length" else max(counts)
        return BlockSize(width, sum(counts), width * spec.batch - sum(counts))
