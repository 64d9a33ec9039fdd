r"""Tokenized batches on disk, under a key of everything they were made from.

The folder is $HPC_CORE_CACHE, else $XDG_CACHE_HOME/hpc-core, else ~/.cache/hpc-core. The files can be deleted at any time.

A whole epoch is one file, written once and then mapped into memory:

    b"hpc-core batches\n" | length of the header, 8 bytes little-endian | header: JSON, padded with spaces to 64 bytes | int32 numbers

The numbers are the width of each batch, then the unpadded tokens of each row, then the ids row by row. The header holds the
CRC-32 of itself (without that field) and of the numbers.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from hpc_core.builders.data.batching import Batch, Block, BlockSize, EpochSize, batches, epoch_size
from hpc_core.builders.data.rows import token_rows
from hpc_core.builders.data.texts import texts
from hpc_core.case.errors import DataError
from hpc_core.case.lengths import recorded_lengths
from hpc_core.case.parts import DataSpec, essence
from hpc_core.case.workloads import FinetuneSpec
from hpc_core.record.files import write_whole

_MAKERS = ("batching.py", "rows.py")
"""The modules that turn a data set into batches. Their source is part of the key."""


def cache_folder() -> Path:
    """Return the folder of the cache. It need not exist."""
    if chosen := os.environ.get("HPC_CORE_CACHE"):
        return Path(chosen).expanduser()
    # An empty or relative XDG_CACHE_HOME counts as unset: XDG Base Directory Specification 0.8.
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "hpc-core"


def cached_epoch(
    workload: FinetuneSpec, *, count: int | None, vocab_size: int, tokenizer: Any | None
) -> tuple[CollatedEpoch, str]:
    """Return all batches that `batching.batches` makes of the workload's data, from the cache. They are made if it has none.

    Args:
        workload: defines data, batch, length, padding and packing.
        count: rows to take, as in `token_rows`.
        vocab_size: ids lie below it.
        tokenizer: as in `token_rows`.

    Returns:
        the epoch, and a note on whether it was found, made, or made again and why.

    Raises:
        DataError: the data is not available, the tokenizer cannot be identified, or the folder cannot be written.
    """
    key = cache_key(workload, count=count, vocab_size=vocab_size, tokenizer=tokenizer)
    path = cache_folder() / "batches" / f"{key}.batches"
    how = f"made and stored as {path.name}"
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises if a parent folder may not be searched
        try:
            return CollatedEpoch(path, key), f"found as {path.name}"
        except DataError as error:
            how = f"made again, because {str(error).removesuffix(' Delete it.')}"
    length = None if workload.packing else workload.length
    rows = token_rows(workload.data, count=count, length=length, vocab_size=vocab_size, tokenizer=tokenizer)
    size = epoch_size(rows, workload)
    try:
        write_collated(path, key, batches(rows, workload), size, batch=workload.batch)
    except OSError as error:
        raise DataError(
            f"Batches cannot be stored in {path.parent}: {error}. Set HPC_CORE_CACHE to a folder that can be written."
        ) from error
    return CollatedEpoch(path, key), how


def cache_key(workload: FinetuneSpec, *, count: int | None, vocab_size: int, tokenizer: Any | None) -> str:
    """Return 32 hex digits of SHA-256 over everything that determines the batches, including the code that makes them.

    Raises:
        DataError: the tokenizer cannot be identified.
    """
    folder = files("hpc_core.builders.data")
    parts = {
        "format": FORMAT,
        "made by": {name: _digest(folder.joinpath(name).read_bytes()) for name in _MAKERS},
        "numpy": np.__version__,  # another version's generators may draw other numbers
        "data": essence(workload.data),
        "content": _content(workload.data),
        "tokenizer": None if workload.data.source in ("random", "trace") else _identity(tokenizer),
        "vocab_size": vocab_size,
        "count": count,
        "batches": [workload.batch, workload.length, workload.padding, workload.packing],
    }
    return _digest(msgspec.json.encode(parts, order="sorted"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _content(data: DataSpec) -> str:
    """Return a digest of the texts themselves, because a file can change under the same name."""
    if data.source == "random":
        return ""
    if data.source == "trace":
        return _digest(msgspec.json.encode(recorded_lengths(data.name or "")))
    return _digest(msgspec.json.encode([text.encode("utf-8", errors="surrogatepass") for text in texts(data)]))


def _identity(tokenizer: Any | None) -> str:
    """Return a digest that identifies a tokenizer: its fast backend or else its vocabulary, and how it encodes a probe."""
    if tokenizer is None:
        return "bytes"
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        whole = str(fast.to_str())
    elif hasattr(tokenizer, "get_vocab"):
        whole = msgspec.json.encode(sorted(tokenizer.get_vocab().items())).decode()
    else:
        raise DataError(
            f"{type(tokenizer).__name__} has neither backend_tokenizer nor get_vocab, so its batches cannot be identified in the cache: use tokenize='fetch'."
        )
    probe = list(tokenizer.encode("Two words, 12.5 %."))
    return _digest(f"{type(tokenizer).__qualname__} {probe} {whole}".encode())


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
    """Write every batch of an epoch, of `batch` rows each, whole or not at all.

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
    header_fields = _Header(
        format=FORMAT,
        key=key,
        batches=len(widths),
        batch=batch,
        masked=masked,
        numbers=len(numbers),
        checksum=0,
        epoch=epoch,
    )
    header = msgspec.json.encode(msgspec.structs.replace(header_fields, checksum=_checksum(header_fields, body)))
    header += b" " * (-(len(_MAGIC) + 8 + len(header)) % _ALIGNED)
    write_whole(path, _MAGIC + len(header).to_bytes(8, "little") + header + body)


class CollatedEpoch:
    """The batches of a cache file. A BlockSource; only its path and key are pickled."""

    tokenize = "cached"

    def __init__(self, path: Path, key: str):
        """Map the file into memory and verify its checksum.

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
                f"{path} is damaged: its header has {header.batches} batches of {header.batch} rows in {len(numbers)} numbers, or a width of 0. Delete it."
            )
        self._lengths = numbers[header.batches : ends].reshape(header.batches, header.batch)
        areas = [width * header.batch for width in widths]
        self._starts = [ends, *(ends + np.cumsum(areas)).tolist()]
        if self._starts[-1] != len(numbers):
            raise DataError(
                f"{path} is damaged: it has {len(numbers)} numbers, but its widths add up to {self._starts[-1]}. Delete it."
            )
        tokens = self._lengths.sum(axis=1, dtype=np.int64).tolist()
        self.sizes = [
            BlockSize(width, real, area - real) for width, real, area in zip(widths, tokens, areas, strict=True)
        ]
        self._numbers = numbers

    def __reduce__(self) -> tuple[type[CollatedEpoch], tuple[Path, str]]:
        return CollatedEpoch, (self._path, self._key)

    def block(self, index: int) -> Block:
        """Return a copy of the batch at this index.

        Raises:
            IndexError: there is no such batch.
        """
        width = self.sizes[index].width
        part = self._numbers[self._starts[index] : self._starts[index + 1]]
        return Block(part.reshape(-1, width).astype(np.int64), self._lengths[index].astype(np.int64))


def _checksum(header: _Header, body: bytes | memoryview) -> int:
    """Return the CRC-32 of the header without its checksum, and of the numbers."""
    return zlib.crc32(body, zlib.crc32(msgspec.json.encode(msgspec.structs.replace(header, checksum=0))))


def _read(path: Path, key: str) -> tuple[_Header, NDArray[np.int32]]:
    damaged = f"{path} is not an intact file of batches"
    try:
        with path.open("rb") as file:
            magic, size = file.read(len(_MAGIC)), int.from_bytes(file.read(8), "little")
            if magic != _MAGIC or size > path.stat().st_size:
                raise DataError(f"{damaged}: it does not begin with the format's magic bytes. Delete it.")
            header = msgspec.json.decode(file.read(size), type=_Header)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataError(f"{damaged}: {error}. Delete it.") from error
    if (header.format, header.key) != (FORMAT, key):
        raise DataError(f"{path} is of format {header.format} and key {header.key}, not {FORMAT} and {key}. Delete it.")
    begin = len(_MAGIC) + 8 + size
    expected = begin + header.numbers * _NUMBER.itemsize
    if path.stat().st_size != expected or not header.numbers:
        raise DataError(f"{damaged}: it has {path.stat().st_size} bytes, but its header needs {expected}. Delete it.")
    numbers = np.memmap(path, dtype=_NUMBER, mode="r", offset=begin, shape=(header.numbers,))
    checksum = _checksum(header, numbers.data)
    if checksum != header.checksum:
        raise DataError(f"{damaged}: its checksum is {checksum:#010x}, not {header.checksum:#010x}. Delete it.")
    return header, numbers
