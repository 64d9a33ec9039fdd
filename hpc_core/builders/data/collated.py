r"""A whole epoch of batches in one file: written once, mapped into memory ever after.

    b"hpc-core batches\n" | header's length, 8 bytes little-endian | header, JSON, spaces up to a multiple of 64 | int32 numbers

The numbers are the width of each batch, then the real tokens of each row, then the ids row by row. The header holds the CRC-32 of
itself without it and of the numbers.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_core.builders.data.batching import Batch, EpochSize
from hpc_core.builders.data.blocks import Block, BlockSize
from hpc_core.case.errors import DataError
from hpc_core.record.files import write_whole

__all__ = ["FORMAT", "CollatedEpoch", "write_collated"]

FORMAT = 1
_MAGIC = b"hpc-core batches\n"
_ALIGNED = 64
_NUMBER = np.dtype("<i4")


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    key: str
    batches: int
    batch: int
    """Rows of each batch."""
    masked: bool
    numbers: int
    checksum: int
    epoch: EpochSize


def write_collated(path: Path, key: str, made: Iterable[Batch], epoch: EpochSize, *, batch: int) -> None:
    """Write every batch of an epoch, whole or not at all; `batch` rows each.

    Raises:
        OSError: the folder cannot be written.
    """
    widths, lengths, ids, masked = [], [], [], False
    for each in made:
        masked = masked or each.mask is not None
        widths.append(len(each.ids[0]))
        lengths += [len(row) for row in each.ids] if each.mask is None else [sum(row) for row in each.mask]
        ids.append(np.asarray(each.ids, dtype=_NUMBER).reshape(-1))
    numbers = np.concatenate([np.asarray(widths, _NUMBER), np.asarray(lengths, _NUMBER), *ids])
    body = numbers.tobytes()
    said = _Header(
        format=FORMAT,
        key=key,
        batches=len(widths),
        batch=batch,
        masked=masked,
        numbers=len(numbers),
        checksum=0,
        epoch=epoch,
    )
    header = msgspec.json.encode(msgspec.structs.replace(said, checksum=_checksum(said, body)))
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGNED)
    write_whole(path, _MAGIC + len(header).to_bytes(8, "little") + header + body)


class CollatedEpoch:
    """The batches of such a file. A BlockSource; only its path is pickled."""

    tokenize = "cached"

    def __init__(self, path: Path, key: str):
        """Map the file and check it against its checksum.

        Raises:
            DataError: the file is damaged, cut off, of another format, or of another key.
        """
        self._path, self._key = path, key
        header, numbers = _read(path, key)
        self.masked, self.epoch = header.masked, header.epoch
        ends = header.batches * (1 + header.batch)
        widths = numbers[: max(header.batches, 0)].tolist()
        if min(header.batches, header.batch, *widths) < 1 or ends > len(numbers):
            raise DataError(
                f"{path} says that it holds {header.batches} batches of {header.batch} rows in {len(numbers)} numbers, or a row without width: delete it."
            )
        self._lengths = numbers[header.batches : ends].reshape(header.batches, header.batch)
        areas = [width * header.batch for width in widths]
        self._starts = [ends, *(ends + np.cumsum(areas)).tolist()]
        if self._starts[-1] != len(numbers):
            raise DataError(f"{path} holds {len(numbers)} numbers, its widths say {self._starts[-1]}: delete it.")
        tokens = self._lengths.sum(axis=1, dtype=np.int64).tolist()
        self.sizes = [
            BlockSize(width, real, area - real) for width, real, area in zip(widths, tokens, areas, strict=True)
        ]
        self._numbers = numbers

    def __reduce__(self) -> tuple[type[CollatedEpoch], tuple[Path, str]]:
        return CollatedEpoch, (self._path, self._key)

    def block(self, index: int) -> Block:
        """The batch at this index, copied out of the file's pages.

        Raises:
            IndexError: there is none.
        """
        width = self.sizes[index].width
        part = self._numbers[self._starts[index] : self._starts[index + 1]]
        return Block(part.reshape(-1, width).astype(np.int64), self._lengths[index].astype(np.int64))


def _checksum(header: _Header, body: bytes | memoryview) -> int:
    """Of the header without its checksum, and of the numbers."""
    return zlib.crc32(body, zlib.crc32(msgspec.json.encode(msgspec.structs.replace(header, checksum=0))))


def _read(path: Path, key: str) -> tuple[_Header, NDArray[np.int32]]:
    damaged = f"{path} is no intact file of batches"
    try:
        with path.open("rb") as file:
            magic, size = file.read(len(_MAGIC)), int.from_bytes(file.read(8), "little")
            if magic != _MAGIC or size > path.stat().st_size:
                raise DataError(f"{damaged}: it begins otherwise. Delete it.")
            header = msgspec.json.decode(file.read(size), type=_Header)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{damaged}: {error}. Delete it.") from error
    if (header.format, header.key) != (FORMAT, key):
        raise DataError(f"{path} is of format {header.format} and key {header.key}, not {FORMAT} and {key}. Delete it.")
    begin = len(_MAGIC) + 8 + size
    expected = begin + header.numbers * _NUMBER.itemsize
    if path.stat().st_size != expected or not header.numbers:
        raise DataError(f"{damaged}: it has {path.stat().st_size} bytes, its header says {expected}. Delete it.")
    numbers = np.memmap(path, dtype=_NUMBER, mode="r", offset=begin, shape=(header.numbers,))
    checksum = _checksum(header, numbers.data)
    if checksum != header.checksum:
        raise DataError(f"{damaged}: its checksum is {checksum:#010x}, not {header.checksum:#010x}. Delete it.")
    return header, numbers
