"""Allow one run per GPU, of all users: a lock file in /tmp, held until this process ends. GPUs are identified by UUID."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_FOLDER = Path("/tmp")  # noqa: S108 - TMPDIR may be each user's own
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # neither a link nor a FIFO that somebody put there


class GpuInUseError(Exception):
    """Another run uses a GPU; the message names the GPU and the process."""


class GpuLocks:
    """Locks of GPUs. The operating system releases them when this process ends, even after a crash."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        self._folder = folder
        self._held: list[int] = []

    def take(self, gpus: Sequence[dict[str, Any]]) -> None:
        """Lock all of these GPUs, as `environment.visible_gpus` returns them, or none.

        Raises:
            GpuInUseError: another process uses one of them, or its lock file cannot be opened.
        """
        for gpu in gpus:
            try:
                self._held.append(self._lock(gpu))
            except GpuInUseError:
                self.release()
                raise

    def _lock(self, gpu: dict[str, Any]) -> int:
        name = re.sub(r"[^A-Za-z0-9-]+", "-", str(gpu["uuid"]))
        path = self._folder / f"hpc-core-{name}.lock"
        try:
            fd = _opened(path)
        except OSError as error:
            raise GpuInUseError(
                f"whether another hpc-core run is using {gpu['name']} cannot be found out: {path} cannot be opened ({error.strerror}). "
                "Remove it, or ask its owner to."
            ) from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(fd)
            os.close(fd)
            raise GpuInUseError(
                f"another hpc-core run ({holder}) is using {gpu['name']} ({gpu['uuid']}): wait for it, end it, "
                "or choose another GPU with CUDA_VISIBLE_DEVICES."
            ) from error
        return fd

    def release(self) -> None:
        """Release all locks. May be called again."""
        while self._held:
            os.close(self._held.pop())


def _opened(path: Path) -> int:
    """Open the file, whoever made it, and let everybody open it who comes later.

    For reading only, which is all that a lock needs: the file belongs to the user who came first. And O_CREAT only where there is none:
    in a folder like /tmp the kernel refuses it for a file of somebody else (fs.protected_regular).
    """
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, _READ)
    try:
        fd = os.open(path, _READ | os.O_CREAT | os.O_EXCL)
    except FileExistsError:  # another run was faster
        return os.open(path, _READ)
    os.fchmod(fd, 0o444)  # whatever the umask says
    return fd


def _holder(fd: int) -> str:
    """Return the process that holds the lock, and its user, as the kernel lists them."""
    inode = str(os.fstat(fd).st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        _, kind, *fields = line.split()
        if kind == "FLOCK" and fields[3].endswith(f":{inode}"):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended, or lives in another container
                return f"pid {fields[2]} of {psutil.Process(int(fields[2])).username()}"
    return "of an unknown process"
