"""Only one run uses a GPU at a time, whoever starts it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpc_core.launch.gpu_lock import GpuInUseError, GpuLocks

GPU = {"uuid": "GPU-1/../x", "name": "some GPU"}
_OTHER_USER = 65534
_TAKE = f"""
import os, sys
from pathlib import Path
from hpc_core.launch.gpu_lock import GpuInUseError, GpuLocks
os.setgroups([]); os.setgid({_OTHER_USER}); os.setuid({_OTHER_USER}); os.umask(0o077)
locks = GpuLocks(Path(sys.argv[1]))
try:
    locks.take([{GPU}])
    print("taken")
except GpuInUseError as error:
    print(error)
"""


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder like the system's for temporary files: everybody may write, and only owners may remove."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def take_as_another_user(folder: Path) -> str:
    """Take the GPU as another user in a new process, and return what it printed."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    command = [sys.executable, "-c", _TAKE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_one_run_a_gpu(tmp_path: Path) -> None:
    """A second run on a GPU is refused with the first one's process id; it may start once the first has ended."""
    gpu = {"uuid": "GPU-1/../x", "name": "some GPU"}
    first, second = GpuLocks(tmp_path), GpuLocks(tmp_path)
    first.take([gpu])
    with pytest.raises(GpuInUseError, match=r"pid \d+ of .+\) is using some GPU"):
        second.take([{"uuid": "GPU-2", "name": "free"}, gpu])
    first.release()
    second.take([gpu])
    second.release()


def test_another_user_waits_for_the_run_and_then_takes_the_gpu(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock file of another user refuses a second run, and serves it after the first, whatever the umask."""
    before = os.umask(0o077)
    first = GpuLocks(shared)
    first.take([GPU])
    os.umask(before)
    assert f"pid {os.getpid()} of " in take_as_another_user(shared)
    first.release()
    assert take_as_another_user(shared) == "taken"


def test_root_takes_a_gpu_after_another_user(shared: Path) -> None:
    """Root can use another user's lock file even where the kernel protects files in sticky folders."""
    assert take_as_another_user(shared) == "taken"
    (lock,) = shared.iterdir()
    assert (lock.stat().st_uid, stat.S_IMODE(lock.stat().st_mode)) == (_OTHER_USER, 0o444)
    GpuLocks(shared).take([GPU])


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero"), lambda path: Path(path).mkdir()]
)
def test_a_foreign_file_in_its_place_hangs_nothing(make: object, tmp_path: Path) -> None:
    """A FIFO, a link or a folder in the lock file's place neither hangs a run nor is followed."""
    path = tmp_path / "hpc-core-GPU-1-x.lock"
    make(path)  # type: ignore[operator]
    locks = GpuLocks(tmp_path)
    if path.is_symlink():
        with pytest.raises(GpuInUseError, match="cannot be opened"):
            locks.take([GPU])
    else:
        locks.take([GPU])
    locks.release()
