"""One run a GPU, whoever starts it."""

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
    """A folder like /tmp, and in it, where everybody can reach it: everybody may write, and only owners may remove."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def take_as_another_user(folder: Path) -> str:
    """What came of it, in a process of its own."""
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
    """A lock file stays and belongs to the user who came first, whatever the umask: others can use it nevertheless."""
    before = os.umask(0o077)
    first = GpuLocks(shared)
    first.take([GPU])
    os.umask(before)
    assert f"pid {os.getpid()} of " in take_as_another_user(shared)
    first.release()
    assert take_as_another_user(shared) == "taken"


def test_root_takes_a_gpu_after_another_user(shared: Path) -> None:
    """Where the kernel protects files in sticky folders (fs.protected_regular), it does so from root as well."""
    assert take_as_another_user(shared) == "taken"
    (lock,) = shared.iterdir()
    assert (lock.stat().st_uid, stat.S_IMODE(lock.stat().st_mode)) == (_OTHER_USER, 0o444)
    GpuLocks(shared).take([GPU])


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: Path(path).symlink_to("/dev/zero"), lambda path: Path(path).mkdir()]
)
def test_what_somebody_put_in_its_place_is_one_clear_line(make: object, tmp_path: Path) -> None:
    """Neither a FIFO nor a link nor a folder hangs a run or is followed."""
    path = tmp_path / "hpc-core-GPU-1-x.lock"
    make(path)  # type: ignore[operator]
    locks = GpuLocks(tmp_path)
    if path.is_symlink():
        with pytest.raises(GpuInUseError, match="cannot be opened"):
            locks.take([GPU])
    else:
        locks.take([GPU])
    locks.release()
