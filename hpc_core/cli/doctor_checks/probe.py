"""One question to one library, in a process of its own: `python -m hpc_core.cli.doctor_checks.probe NAME` prints a marker and JSON.

What a library prints while it is imported stands before the marker. Whatever it raises is told as its answer.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["MARKER", "QUESTIONS", "main"]

MARKER = "hpc-core-doctor:"


def _version(package: str, module: Any) -> str:
    try:
        return importlib.metadata.version(package) if module is None else str(module.__version__)
    except (importlib.metadata.PackageNotFoundError, AttributeError):
        # A module without a version of its own has that of its distribution, if it has one.
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "unknown"


def _plain(package: str, name: str) -> dict[str, Any]:
    return {"version": _version(package, importlib.import_module(name))}


def _torch() -> dict[str, Any]:
    torch: Any = importlib.import_module("torch")
    told: dict[str, Any] = {"version": _version("torch", torch), "cuda": None, "devices": 0}
    told["cuda"] = getattr(getattr(torch, "version", None), "cuda", None)
    try:
        told["devices"] = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if told["devices"]:
            torch.zeros(1, device="cuda")  # a driver that is too old is only noticed here
            told["capability"] = list(torch.cuda.get_device_capability(0))
    except Exception as error:  # how a broken driver or torch raises is what is being asked
        told["cuda_error"] = f"{type(error).__name__}: {error}"
    return told


def _bitsandbytes() -> dict[str, Any]:
    bnb: Any = importlib.import_module("bitsandbytes")
    told: dict[str, Any] = {"version": _version("bitsandbytes", bnb)}
    try:
        torch: Any = importlib.import_module("torch")
        functional: Any = importlib.import_module("bitsandbytes.functional")
        library: Any = getattr(importlib.import_module("bitsandbytes.cextension"), "lib", None)
        told["library"] = type(library).__name__
        told["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        functional.quantize_4bit(torch.ones(64, 64, device=told["device"]), quant_type="nf4")
    except Exception as error:  # how a broken bitsandbytes raises is what is being asked
        told["quantize_error"] = f"{type(error).__name__}: {error}"
    return told


def _gpus() -> dict[str, Any]:
    from hpc_core.record.environment import machine, visible_gpus
    from hpc_core.record.gpu_state import read_state

    found = []
    for gpu in visible_gpus():
        state = read_state(gpu["index"])
        found.append({**gpu, "state": state, "users": _users(gpu["index"])})
    where = machine("cuda" if found else "cpu")
    return {"gpus": found, "machine": {"key": where.key, "name": where.name, "memory_bytes": where.memory_bytes}}


def _users(index: int) -> list[dict[str, Any]]:
    import pynvml

    pynvml.nvmlInit()
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
        # Inside a container the driver hides how much another process holds.
        return [{"pid": int(each.pid), "used_bytes": each.usedGpuMemory} for each in running]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


QUESTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "gpus": _gpus,
    "torch": _torch,
    "bitsandbytes": _bitsandbytes,
    "transformers": lambda: _plain("transformers", "transformers"),
    "peft": lambda: _plain("peft", "peft"),
    "accelerate": lambda: _plain("accelerate", "accelerate"),
    "torchao": lambda: _plain("torchao", "torchao"),
    "liger-kernel": lambda: _plain("liger-kernel", "liger_kernel"),
    "datasets": lambda: _plain("datasets", "datasets"),
    "gguf": lambda: _plain("gguf", "gguf"),
    "matplotlib": lambda: _plain("matplotlib", "matplotlib"),
    "triton": lambda: _plain("triton", "triton"),
}


def main(name: str) -> None:
    """Answer one question on stdout."""
    try:
        said: dict[str, Any] = {"answer": QUESTIONS[name]()}
    except ModuleNotFoundError as error:
        said = {"missing": error.name or str(error), "error": str(error)}
    except (Exception, SystemExit) as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(f"\n{MARKER}{json.dumps(said, default=str)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
