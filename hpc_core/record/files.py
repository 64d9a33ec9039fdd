"""The one door to files: read a regular file of bounded size, write a file whole or not at all, and both for records."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from pathlib import Path

from hpc_core.case.errors import SpecError
from hpc_core.record.record import Record, record_from_json, record_to_json

_IN_BASELINES = b'"accepted"'
LARGEST_BYTES = 64 * 2**20
"""Of a file with a record. One takes 4 to 30 KB, a run's `--benchmark-json` a few megabytes."""


def write_whole(path: Path, content: bytes) -> None:
    """Replace a file with this content, or leave it unchanged if that fails. Creates missing parent folders.

    What is no regular file, such as a device, a pipe or `/dev/stdout`, is written to and stays. A link stays a link.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    try:
        descriptor = _straight(path)
        if descriptor is None:
            _replace(path.resolve(), content)
            return
        sys.stdout.flush()  # so that what was printed before comes first
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
    except OSError as error:
        reason = "nothing reads from this pipe or socket" if error.errno == errno.ENXIO else error.strerror
        raise OSError(error.errno, reason or str(error), str(path)) from error


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{secrets.token_hex(8)}.tmp"
    try:
        with draft.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)  # noqa: PTH105 - named for what matters: it is atomic
    finally:
        draft.unlink(missing_ok=True)


def _straight(path: Path) -> int | None:
    """Return a descriptor to write to at once; None for a regular file, or where there is nothing yet."""
    own = _own_descriptor(path)
    if own is not None:
        return os.dup(own)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)  # a pipe without a reader would block
    os.set_blocking(descriptor, True)
    return descriptor


def _own_descriptor(path: Path) -> int | None:
    """Return the open descriptor that a path such as `/dev/stdout` or `/dev/fd/3` stands for; None for any other path."""
    for _ in range(40):  # the kernel follows as many links
        if path.name.isdecimal() and os.path.realpath(path.parent) == f"/proc/{os.getpid()}/fd":
            return int(path.name)
        if not path.is_symlink():
            return None
        path = path.parent / path.readlink()
    return None


def read_regular(path: Path, most: int = LARGEST_BYTES) -> bytes:
    """Return the content of a regular file of at most so many bytes.

    Raises:
        OSError: it cannot be read, is larger, or is no regular file: a pipe would block, and a device may never end.
    """
    _check_regular(path, path.stat().st_mode)  # before it is opened, which some devices take as an order
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY), "rb") as file:
        _check_regular(path, os.fstat(file.fileno()).st_mode)  # it may have been exchanged since
        raw = file.read(most + 1)
    if len(raw) > most:
        raise OSError(errno.EFBIG, f"larger than {most // 2**20} MiB, the most that is read", str(path))
    return raw


def _check_regular(path: Path, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def read_record(path: Path) -> Record:
    """Read a record.

    Raises:
        SpecError: the file cannot be read or is not a record; the message names the file.
    """
    try:
        raw = read_regular(path)
    except OSError as error:
        raise SpecError(
            f"{path}: {error.strerror}. A record is a file that --perf-records or 'run --json' wrote."
        ) from error
    try:
        return record_from_json(raw)
    except SpecError as error:
        if _IN_BASELINES in raw:
            raise SpecError(f"{path}: this is a baseline, not a record. Show it: hpc-core baseline show.") from error
        raise SpecError(f"{path}: {error}") from error


def write_record(path: Path, record: Record) -> None:
    """Write a record whole or not at all.

    Raises:
        OSError: as `write_whole`.
    """
    write_whole(path, record_to_json(record, indent=2) + b"\n")
