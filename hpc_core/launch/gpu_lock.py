"""Allow one run per GPU: a lock file in the temporary folder, held until this process ends. GPUs are identified by UUID."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class GpuInUseError(Exception):
    """Another run uses a GPU; the message names the GPU and the process."""


class GpuLocks:
    """Locks of GPUs. The operating system releases them when this process ends, even after a crash."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._held: list[int] = []

    def take(self, gpus: Sequence[dict[str, Any]]) -> None:
        """Lock all of these GPUs, as `environment.visible_gpus` returns them, or none.

        Raises:
            GpuInUseError: another process uses one of them.
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
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise GpuInUseError(
                f"another hpc-core run (pid {holder}) is using {gpu['name']} ({gpu['uuid']}): wait for it, end it, "
                "or choose another GPU with CUDA_VISIBLE_DEVICES."
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd

    def release(self) -> None:
        """Release all locks. May be called again."""
        while self._held:
            os.close(self._held.pop())
