"""Change the files of a case as one: one process at a time, and all or none, also where the process is killed.

While it writes, the files' folder holds a folder `.accepting`, which git ignores by a rule of its own:

    <name>.new   the new content of a file
    journal      the names of the files to replace and to remove: once it is there, the change counts

A killed process releases its lock. The next one that reads or writes there completes the change if there is a journal, and
otherwise drops what was written. Files are replaced in an order in which each state in between can be judged by: first what
is only used if it fits the baseline, then the baseline, then its history.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from hpc_core.case.errors import BaselineError
from hpc_core.record.files import read_regular, write_whole

_FOLDER = ".accepting"
_IGNORE = ".gitignore"
_JOURNAL = "journal"
_DRAFT = ".new"
_WAIT_S = 60.0
"""For another process. An acceptance takes milliseconds."""
_LARGEST_BYTES = 2**16


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder of baselines, which is made where it is missing, until no other process can lose what this one reads.

    The lock is one on the folder itself: it needs no file, no right to write, and nothing to commit or to ignore.

    Raises:
        BaselineError: the folder cannot be made or locked, or another process holds it for a minute.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(folder) as descriptor:
            _wait(descriptor, folder)
            _recover(folder)
            yield
    except OSError as error:
        raise BaselineError(f"{error.filename or folder}: cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        with contextlib.suppress(OSError):  # a file system without locks holds none
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was forked meanwhile would go on holding it
        os.close(descriptor)


def _wait(descriptor: int, folder: Path) -> None:
    end = time.monotonic() + _WAIT_S
    try:
        free = _free(descriptor)
    except OSError as error:
        raise BaselineError(
            f"{folder}: its file system cannot lock it ({error.strerror}), and processes could lose each other's sessions. "
            "Mount it with locks (Lustre: -o flock), or accept elsewhere and copy the files."
        ) from error
    while not free:
        if time.monotonic() > end:
            raise BaselineError(
                f"{folder}: another process has been accepting here for {_WAIT_S:.0f} s. End it, then accept again."
            )
        time.sleep(0.01)
        free = _free(descriptor)


def _free(descriptor: int) -> bool:
    """Take the lock, and return whether that was possible."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def replace_together(contents: Mapping[Path, bytes | None]) -> None:
    """Replace files of one locked folder, in this order, then remove those without a content.

    Raises:
        BaselineError: they cannot be written; the message says whether they are as before.
    """
    folder = next(iter(contents)).parent
    drafts, names = folder / _FOLDER, dict[str, bool]()
    try:
        for path in contents:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        drafts.mkdir()
        (drafts / _IGNORE).write_bytes(b"*\n")
        for path, content in contents.items():
            if content is not None:
                write_whole(drafts / f"{path.name}{_DRAFT}", content)
        names = {path.name: content is not None for path, content in contents.items()}
        write_whole(drafts / _JOURNAL, msgspec.json.encode(names))
        _flush(drafts)
        _complete(folder, names)
    except OSError as error:
        begun = any(_is_done(drafts, name) for name, replaced in names.items() if replaced)
        if not begun:
            _clear(drafts)
        what = folder / Path(error.filename or folder).name.removesuffix(_DRAFT)
        state = "The next command that reads it completes it." if begun else "The old files are intact."
        raise BaselineError(f"{what}: cannot be written: {error.strerror}. {state}") from error


def recover(folder: Path) -> None:
    """Complete or drop what a process that was killed has left in a folder, unless another is at work there.

    Without the right to write, the files stay as they are: each state in between can be judged by.
    """
    if not (folder / _FOLDER).is_dir():
        return
    with contextlib.suppress(PermissionError), _opened(folder) as descriptor:
        if _free(descriptor):
            try:
                _recover(folder)
            except OSError as error:
                if error.errno != errno.EROFS:
                    raise


def _recover(folder: Path) -> None:
    drafts = folder / _FOLDER
    if not drafts.is_dir():
        return
    names = _journal(drafts)
    if names is None:
        _clear(drafts)
    else:
        _complete(folder, names)


def _journal(drafts: Path) -> dict[str, bool] | None:
    """Return what is to be done; None if no change was decided on, or another program wrote the journal."""
    try:
        names = msgspec.json.decode(read_regular(drafts / _JOURNAL, _LARGEST_BYTES), type=dict[str, bool])
    except (FileNotFoundError, msgspec.MsgspecError, UnicodeError):
        return None
    return names if all(name and name == Path(name).name and not name.startswith(".") for name in names) else None


def _complete(folder: Path, names: Mapping[str, bool]) -> None:
    """Do what the journal says, as far as it is not done, and remove it."""
    drafts = folder / _FOLDER
    for name, replaced in names.items():
        if replaced and not _is_done(drafts, name):
            (drafts / f"{name}{_DRAFT}").replace(folder / name)
    for name, replaced in names.items():
        if not replaced:
            (folder / name).unlink(missing_ok=True)
    _flush(folder)
    _clear(drafts)


def _is_done(drafts: Path, name: str) -> bool:
    return not (drafts / f"{name}{_DRAFT}").exists()


def _clear(drafts: Path) -> None:
    """Remove the folder with its drafts: the journal first, and the rule by which git ignores them last."""
    if not drafts.is_dir():
        return
    (drafts / _JOURNAL).unlink(missing_ok=True)
    for path in sorted(drafts.iterdir(), reverse=True, key=lambda path: path.name != _IGNORE):
        path.unlink(missing_ok=True)
    drafts.rmdir()


def _flush(folder: Path) -> None:
    """Have the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
