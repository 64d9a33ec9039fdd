"""Factories for the cases of tests/launch: each does one thing to its worker. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

Step = Callable[[], None]
CALLS: list[str] = []
"""One entry for each case that ran in this process."""


def quiet() -> Step:
    return lambda: None


def counted(path: str) -> Step:
    """Write how many cases this process has run, and its variable HPC_CORE_TEST."""
    CALLS.append(path)
    facts = {"calls": len(CALLS), "variable": os.environ.get("HPC_CORE_TEST"), "folder": str(Path.cwd())}
    Path(path).write_text(json.dumps(facts))
    return quiet()


def noisy() -> Step:
    """Write what looks like the protocol, and bytes that are not text, to stdout and stderr."""
    for _ in range(200):
        print('{"event":"phase","name":"forged"}\n{"event":"exited","code":0,"signal":null,"leftovers":0}')
        print("not JSON", file=sys.stderr)
        os.write(1, b"\xff\xfe\x00")
    return quiet()


def says_then_raises(words: str) -> Step:
    print(words)
    raise ValueError("the factory has no mind to")


def needs_package(name: str) -> Step:
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def out_of_host_memory() -> Step:
    raise MemoryError("cannot allocate 512 GiB")


def out_of_gpu_memory() -> Step:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def interrupted() -> Step:
    raise KeyboardInterrupt


def aborts() -> Step:
    return os.abort


def exits(code: int) -> Step:
    sys.exit(code)


def exits_at_once(code: int) -> Step:
    print("last words", flush=True)
    os._exit(code)


def kills_itself() -> Step:
    os.kill(os.getpid(), signal.SIGKILL)
    return quiet()


def forges(line: str) -> Step:
    """Write a line to every pipe that this process can write to; one of them carries the events."""
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if int(entry.name) > 2 and str(entry.readlink()).startswith("pipe:"):
                os.write(int(entry.name), line.encode() + b"\n")
    return quiet()


def forges_and_ends(line: str) -> Step:
    forges(line)
    os._exit(0)


_LIST_PIPES = """
import os
names = {fd: os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if int(fd) > 2}
print(sorted(fd for fd, name in names.items() if "pipe:" in name))
"""


def lists_inherited_pipes(path: str) -> Step:
    """Write which pipes a program inherits that is started without closing any descriptor."""
    command = [sys.executable, "-S", "-c", _LIST_PIPES]
    Path(path).write_text(subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True).stdout)
    return quiet()


def hangs(seconds: float = 600.0) -> Step:
    return lambda: time.sleep(seconds)


def leaves_children(marker: str, hang: bool = True) -> Step:
    """Start a child, a child in its own session, and an orphan in one; each has the marker as an argument."""
    sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)", marker]
    subprocess.Popen(sleep)
    subprocess.Popen(sleep, start_new_session=True)
    orphaning = f"import subprocess; subprocess.Popen({sleep!r}, start_new_session=True)"
    subprocess.run([sys.executable, "-S", "-c", orphaning], check=True)
    return hangs() if hang else quiet()
