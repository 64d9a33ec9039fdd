"""Write a file whole or not at all, and read and write a record as one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from hpc_core.case.errors import SpecError
from hpc_core.record.record import Record, record_from_json, record_to_json


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file with this content, or leave it unchanged if that fails. Creates missing parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        draft.write_bytes(content)
        os.replace(draft, path)  # noqa: PTH105 - named for what matters: it is atomic
    finally:
        draft.unlink(missing_ok=True)


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        SpecError: the file cannot be read or is not a record; the message names the file.
    """
    try:
        return record_from_json(path.read_bytes())
    except OSError as error:
        raise SpecError(
            f"{path}: {error.strerror}. A record is a file that --perf-records or 'run --json' wrote."
        ) from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all."""
    write_whole(path, record_to_json(record, indent=2) + b"\n")
