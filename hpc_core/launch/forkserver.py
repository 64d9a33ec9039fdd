"""The warm parent: `python -m hpc_core.launch.forkserver …` imports torch and transformers once, then forks workers.

It imports neither peft nor bitsandbytes: those initialize CUDA, which a forked child could not use. A parent of predictions
(HPC_CORE_FAKE_CUDA=1) loads the empty CUDA device before torch and has no such worry; nor has one on a machine without CUDA,
which may be asked for more (HPC_CORE_PRELOAD_MORE=peft,bitsandbytes): a tiny case spends most of its time importing them. It runs no job
itself, sets no thread count and computes nothing: a pool of torch's threads would not survive the fork. (The threads it
has are OpenBLAS's, numpy's and scipy's, which OpenBLAS starts again in a child by itself.) It ends with its socket.
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

import msgspec

from hpc_core.launch.by_nvml import gpus_by_nvml
from hpc_core.launch.supervisor import supervise
from hpc_core.record.job import (
    FAKE_CUDA,
    PRELOAD_MORE,
    Preloaded,
    Request,
)

__all__ = ["main"]

_PRELOAD = (
    "torch",
    "transformers",
    # transformers imports its parts when they are first named; these are what a Llama costs.
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.generation",
    "hpc_core.worker.main",
    # A tiny case is measured in less time than these take to import.
    "hpc_core.worker.finetune",
    "hpc_core.worker.generate",
)
_MUST_NOT_BE_LOADED = ("peft", "bitsandbytes")
_PRELOAD_FAKE = ("peft", "bitsandbytes", "hpc_core.predict.session")
_REQUEST_BYTES = 1 << 20


def main(arguments: list[str] | None = None) -> None:
    """Preload, say so on the socket, then fork a supervised worker for each request."""
    parser = argparse.ArgumentParser(prog="python -m hpc_core.launch.forkserver", description=__doc__)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--preload-limit", type=float, required=True, help="seconds")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(math.ceil(chosen.preload_limit))  # ends a preload that hangs, even if nobody is left to end it
    ready = _preload()
    signal.alarm(0)
    with socket.socket(fileno=chosen.socket_fd) as line:
        line.set_inheritable(False)
        line.send(msgspec.json.encode(ready))
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors report by themselves; the kernel reaps them
        _serve(line)


def _preload() -> Preloaded:
    """Import what every case needs.

    Raises:
        RuntimeError: this initialized CUDA, or imported peft or bitsandbytes: children could not use the GPU.
    """
    began = time.monotonic()
    fake = os.environ.get(FAKE_CUDA) == "1"
    if fake:
        importlib.import_module("hpc_core.predict.shim").load()
    with gpus_by_nvml():
        for name in _PRELOAD:
            importlib.import_module(name)
        if fake:
            _import_what_is_there(_PRELOAD_FAKE)
        more = _asked_for()
    initialized = bool(sys.modules["torch"].cuda.is_initialized())
    if initialized:
        raise RuntimeError("Preloading initialized CUDA; a forked worker could not use it.")
    _import_what_is_there(more)
    for name in _MUST_NOT_BE_LOADED:
        if name in sys.modules and not fake and not more:
            raise RuntimeError(f"Preloading imported {name}, which initializes CUDA; a forked worker could not use it.")
    gc.collect()
    gc.freeze()  # children do not walk, and so do not copy, what is shared
    return Preloaded(
        pid=os.getpid(),
        seconds=round(time.monotonic() - began, 3),
        modules=tuple(sorted(sys.modules)),
        cuda_initialized=initialized,
    )


def _asked_for() -> tuple[str, ...]:
    """Further packages to import, by PRELOAD_MORE.

    Raises:
        RuntimeError: CUDA can be had, and importing them could initialize it.
    """
    names = tuple(filter(None, os.environ.get(PRELOAD_MORE, "").split(",")))
    if names and sys.modules["torch"].cuda.is_available():
        raise RuntimeError(f"{PRELOAD_MORE} is for machines without CUDA; a forked worker could not use it.")
    return names


def _import_what_is_there(names: tuple[str, ...]) -> None:
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):  # a case that needs it will say so
            importlib.import_module(name)


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
    """In the worker: look like a freshly started interpreter as far as environment and folder go, and serve the job."""
    for name, value in request.environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(request.folder)
    if not sys.flags.safe_path:
        sys.path[0] = request.folder  # what `python -m` put there was the folder of the warm parent
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    importlib.import_module("hpc_core.worker.main").serve(job_fd, events_fd)


if __name__ == "__main__":
    main()
