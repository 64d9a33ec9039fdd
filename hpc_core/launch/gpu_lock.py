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
    """Another run holds a GPU; the text says which, and who."""


class GpuLocks:
    """Holds the locks of some GPUs. The operating system frees them when this process ends, however it ends."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = Path(tempfile.gettempdir()) if folder is None else folder
        self._held: list[int] = []

    def take(self, gpus: Sequence[dict[str, Any]]) -> None:
        """Lock each of these GPUs, as `environment.visible_gpus` tells them, or none.

        Raises:
            GpuInUseError: another process holds one.
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
        """Free all of them. May be called again."""
        while self._held:
            os.close(self._held.pop())
