"""Batches tokenized and packed once and kept on disk, under a key that says everything they were made of.

The folder is $HPC_CORE_CACHE, else $XDG_CACHE_HOME/hpc-core, else ~/.cache/hpc-core. Files in it can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hpc_core.builders.data.batching import batches, epoch_size
from hpc_core.builders.data.collated import FORMAT, CollatedEpoch, write_collated
from hpc_core.builders.data.rows import token_rows
from hpc_core.builders.data.texts import texts
from hpc_core.case.case import DataSpec, FinetuneSpec
from hpc_core.case.errors import DataError
from hpc_core.case.lengths import recorded_lengths
from hpc_core.case.strict import essence

__all__ = ["cache_folder", "cache_key", "cached_epoch"]

_MAKERS = ("batching.py", "draw.py", "rows.py")
"""What turns a data set into batches: another text of one of them is another key."""


def cache_folder() -> Path:
    """Where batches are kept; it need not exist yet."""
    if chosen := os.environ.get("HPC_CORE_CACHE"):
        return Path(chosen).expanduser()
    # An empty or relative XDG_CACHE_HOME counts as unset: XDG Base Directory Specification 0.8.
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "hpc-core"


def cached_epoch(
    workload: FinetuneSpec, *, count: int | None, vocab_size: int, tokenizer: Any | None
) -> tuple[CollatedEpoch, str]:
    """All batches that `batching.batches` makes of the workload's data, from the cache; made first where it has none.

    Args:
        workload: says data, batch, length, padding and packing.
        count: rows to take, as in `token_rows`.
        vocab_size: ids lie below it.
        tokenizer: as in `token_rows`.

    Returns:
        the epoch, and a sentence that says whether it was found, made, or made again and why.

    Raises:
        DataError: the data cannot be had, the tokenizer cannot be told from others, or the folder cannot be written.
    """
    key = cache_key(workload, count=count, vocab_size=vocab_size, tokenizer=tokenizer)
    path = cache_folder() / "batches" / f"{key}.batches"
    how = f"made and kept as {path.name}"
    if os.path.exists(path):  # noqa: PTH110 - Path.exists raises where a folder above may not be searched; then it cannot be written either
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
            f"Batches cannot be kept in {path.parent}: {error}. Set HPC_CORE_CACHE to a folder that can be written."
        ) from error
    return CollatedEpoch(path, key), how


def cache_key(workload: FinetuneSpec, *, count: int | None, vocab_size: int, tokenizer: Any | None) -> str:
    """32 hex digits of SHA-256 over everything that decides the batches, the code that makes them included.

    Raises:
        DataError: the tokenizer cannot be told from others.
    """
    folder = files("hpc_core.builders.data")
    said = {
        "format": FORMAT,
        "made by": {name: _digest(folder.joinpath(name).read_bytes()) for name in _MAKERS},
        "numpy": np.__version__,  # its generators may draw otherwise in another version
        "data": essence(workload.data),
        "content": _content(workload.data),
        "tokenizer": None if workload.data.source in ("random", "trace") else _identity(tokenizer),
        "vocab_size": vocab_size,
        "count": count,
        "batches": [workload.batch, workload.length, workload.padding, workload.packing],
    }
    return _digest(msgspec.json.encode(said, order="sorted"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _content(data: DataSpec) -> str:
    """Of the texts themselves: a file of one name can hold others tomorrow."""
    if data.source == "random":
        return ""
    if data.source == "trace":
        return _digest(msgspec.json.encode(recorded_lengths(data.name or "")))
    return _digest(msgspec.json.encode([text.encode("utf-8", errors="surrogatepass") for text in texts(data)]))


def _identity(tokenizer: Any | None) -> str:
    """What tells a tokenizer from others: all that its fast half holds, else its vocabulary, and how it encodes a probe."""
    if tokenizer is None:
        return "bytes"
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        whole = str(fast.to_str())
    elif hasattr(tokenizer, "get_vocab"):
        whole = msgspec.json.encode(sorted(tokenizer.get_vocab().items())).decode()
    else:
        raise DataError(
            f"{type(tokenizer).__name__} has neither backend_tokenizer nor get_vocab, so its batches cannot be told from another's: say tokenize='fetch'."
        )
    probe = list(tokenizer.encode("Two words, 12.5 %."))
    return _digest(f"{type(tokenizer).__qualname__} {probe} {whole}".encode())
