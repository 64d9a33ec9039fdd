"""The forkserver: `python -m hpc_core.launch.forkserver …` imports torch and transformers once, then forks supervised workers.

multiprocessing's forkserver cannot replace it: there is one a process, it runs the launcher's own interpreter and environment, ignores
a preload that fails, and gives a child neither a working directory, nor output of its own, nor a supervisor that outlives the worker.

A process that has initialized CUDA cannot fork workers that use it. So NVML answers what packages ask about the GPU while they are
imported, and a package that is to be preloaded beyond torch and transformers (--preload peft,bitsandbytes) is first tried in a forked
copy of this process. With --predicting it loads the fake CUDA device before torch and need not care. It runs no job itself, sets no
thread count and computes nothing: a pool of torch's threads would not survive the fork. (The threads it has are OpenBLAS's, numpy's
and scipy's, which OpenBLAS starts again in a child by itself.) It ends when its socket closes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec

from hpc_core.launch.supervisor import supervise
from hpc_core.record.environment import compute_capability

_PRELOAD = (
    "torch",
    "transformers",
    # transformers imports its parts when they are first named; these are what a Llama needs.
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "hpc_core.worker.main",
    # A tiny case is measured in less time than these take to import.
    "hpc_core.worker.perform",
)
_PRELOAD_PREDICTING = ("peft", "bitsandbytes", "hpc_core.predict.perform")
_REQUEST_BYTES = 1 << 20
_TRIAL_LIMIT_S = 60
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


class Preloaded(msgspec.Struct, frozen=True, kw_only=True):
    """What the forkserver reports once, when it is ready to fork workers."""

    pid: int
    seconds: float
    """What importing torch and transformers took."""
    modules: tuple[str, ...]
    """Every module it has imported."""
    cuda_initialized: bool


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Asks the forkserver for one worker; the descriptors of job, events, life and output travel with it."""

    folder: str
    """Working directory."""
    environment: dict[str, str | None] = {}
    """What changed in the launcher's environment since the forkserver started; None unsets."""


def main(arguments: list[str] | None = None) -> None:
    """Preload, report it on the socket, then fork a supervised worker for each request."""
    parser = argparse.ArgumentParser(prog="python -m hpc_core.launch.forkserver", description=__doc__)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--preload-limit", type=float, required=True, help="seconds")
    parser.add_argument("--predicting", action="store_true", help="load the fake CUDA device before torch")
    parser.add_argument(
        "--preload", default="", help="further packages, by commas, if they can be imported without CUDA"
    )
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(math.ceil(chosen.preload_limit))  # ends a preload that hangs, even if nobody is left to end it
    ready = _preload(predicting=chosen.predicting, more=tuple(filter(None, chosen.preload.split(","))))
    signal.alarm(0)
    with socket.socket(fileno=chosen.socket_fd) as line:
        line.set_inheritable(False)
        line.send(msgspec.json.encode(ready))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors report by themselves; the kernel reaps them
        _serve(line)


def _preload(*, predicting: bool, more: tuple[str, ...]) -> Preloaded:
    """Import what every case needs.

    Raises:
        RuntimeError: this initialized CUDA: children could not use the GPU.
    """
    began = time.monotonic()
    if predicting:
        importlib.import_module("hpc_core.predict.shim").load()
    with gpus_by_nvml():
        for name in _PRELOAD:
            importlib.import_module(name)
        if predicting:
            _import_installed(_PRELOAD_PREDICTING)
        cuda = sys.modules["torch"].cuda
        if not cuda.is_available() or _leave_cuda_alone(more):
            _import_installed(more)
    initialized = bool(cuda.is_initialized())
    if initialized:
        raise RuntimeError("Preloading initialized CUDA; a forked worker could not use it.")
    gc.collect()
    gc.freeze()  # children do not walk, and so do not copy, what is shared
    return Preloaded(
        pid=os.getpid(),
        seconds=round(time.monotonic() - began, 3),
        modules=tuple(sorted(sys.modules)),
        cuda_initialized=initialized,
    )


def _leave_cuda_alone(names: tuple[str, ...]) -> bool:
    """Return whether a process that has imported these packages can still fork children that use CUDA, by trying it."""
    if not names:
        return True
    if (child := os.fork()) == 0:
        signal.alarm(_TRIAL_LIMIT_S)  # a parent's alarm is not inherited
        _import_installed(names)
        if (grandchild := os.fork()) == 0:
            sys.modules["torch"].ones(1, device="cuda").item()
            os._exit(0)
        os._exit(os.waitpid(grandchild, 0)[1] != 0)
    return os.waitpid(child, 0)[1] == 0


def _import_installed(names: tuple[str, ...]) -> None:
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):  # a case that needs it will fail with its name
            importlib.import_module(name)


@contextlib.contextmanager
def gpus_by_nvml() -> Iterator[None]:
    """Let NVML answer, in the block, whether there is a GPU and of which compute capability, where torch would ask CUDA.

    `torch.cuda.is_available()` through the CUDA runtime would spoil every fork. And transformers imports torchao where that is installed,
    which asks on import (0.18, `prototype.mx_formats.kernels`) for the capability, and whether the GPU can run triton, for which torch asks
    for the device's properties: both initialize CUDA.
    """
    before = os.environ.get(_NVML_CHECK)
    os.environ[_NVML_CHECK] = "1"
    try:
        with _capability_by_nvml():
            yield
    finally:
        if before is None:
            os.environ.pop(_NVML_CHECK, None)
        else:
            os.environ[_NVML_CHECK] = before


@contextlib.contextmanager
def _capability_by_nvml() -> Iterator[None]:
    capability = compute_capability()
    if capability is None:
        yield
        return
    cuda: Any = importlib.import_module("torch").cuda
    worker: Any = importlib.import_module("torch._dynamo.device_interface").CudaInterface.Worker
    originals = cuda.get_device_capability, worker.get_device_properties
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    cuda.get_device_capability = lambda device=None: capability
    worker.get_device_properties = staticmethod(lambda device=None: properties)
    try:
        yield
    finally:
        cuda.get_device_capability, worker.get_device_properties = originals[0], staticmethod(originals[1])


def _serve(line: socket.socket) -> None:
    while True:
        message, descriptors, _, _ = socket.recv_fds(line, _REQUEST_BYTES, 4)
        if not message:
            return
        if os.fork() == 0:
            try:
                line.close()
                _supervise(msgspec.json.decode(message, type=Request), *descriptors)
            finally:
                os._exit(0)  # never fall back into the loop; what went wrong shows as events without an Exited
        for fd in descriptors:
            os.close(fd)


def _supervise(request: Request, job_fd: int, events_fd: int, life_fd: int, output_fd: int) -> None:
    """In a child: supervise one worker of the request, forked once more."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output_fd, stream)
    for fd in (job_fd, events_fd, life_fd, output_fd):
        os.set_inheritable(fd, False)
    supervise(lambda: _work(request, job_fd, events_fd), events_fd=events_fd, life_fd=life_fd)


def _work(request: Request, job_fd: int, events_fd: int) -> None:
    """In the worker: take the environment and folder of a freshly started interpreter, and serve the job."""
    for name, value in request.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(request.folder)
    if not sys.flags.safe_path:
        sys.path[0] = request.folder  # what `python -m` put there was the folder of the forkserver
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    importlib.import_module("hpc_core.worker.main").serve(job_fd, events_fd)


if __name__ == "__main__":
    main()
