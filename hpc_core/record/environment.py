"""Read where a run happens: machine, stack, host, commit. Imports no torch and does not initialize CUDA."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
from pathlib import Path
from typing import Any, Literal

from hpc_core.case.errors import MeasureError, RepositoryError, SpecError
from hpc_core.record.git import changed_code, head
from hpc_core.record.gpu_state import read_energy_mj, read_state
from hpc_core.record.record import Circumstances, Machine
from hpc_core.record.settings import settings

STACK_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger-kernel", "torchao")
"""Packages whose version can change a metric."""
_COMMIT = "HPC_CORE_COMMIT"
_HASH = re.compile(r"[0-9a-fA-F]{7,64}")


@functools.cache
def visible_gpus() -> tuple[dict[str, Any], ...]:
    """Return name, memory in bytes, uuid and driver of each GPU that CUDA_VISIBLE_DEVICES leaves visible, by NVML; empty without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
        found = [_gpu(pynvml, index, driver) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()
    return tuple(_visible(found))


def compute_capability(position: int = 0) -> tuple[int, int] | None:
    """Return the compute capability of the visible GPU at this position, by NVML; None without one. Does not initialize CUDA."""
    import pynvml

    gpus = visible_gpus()
    if position >= len(gpus):
        return None
    pynvml.nvmlInit()
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(
            pynvml.nvmlDeviceGetHandleByIndex(gpus[position]["index"])
        )
    finally:
        pynvml.nvmlShutdown()
    return int(major), int(minor)


def _gpu(pynvml: Any, index: int, driver: str) -> dict[str, Any]:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    return {
        "name": str(pynvml.nvmlDeviceGetName(handle)),
        "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        "uuid": str(pynvml.nvmlDeviceGetUUID(handle)),
        "driver": driver,
        "index": index,
    }


def _visible(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return found
    visible = []
    for name in (part.strip() for part in chosen.split(",")):
        match = [gpu for gpu in found if name == str(gpu["index"]) or (name and gpu["uuid"].startswith(name))]
        if not match:
            break  # CUDA itself ignores everything after the first unknown entry
        visible += match[:1]
    return visible


def machine(device: Literal["cpu", "cuda"]) -> Machine:
    """Return the first visible GPU, or the CPU. A GPU's key is its model and memory, such as `nvidia-h100-80gb-hbm3-80gib`."""
    gpus = visible_gpus()
    if device == "cpu" or not gpus:
        return cpu_machine()
    name, memory = gpus[0]["name"], gpus[0]["memory_bytes"]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Machine(key=f"{slug}-{round(memory / 2**30)}gib", name=name, memory_bytes=memory)


def cpu_machine() -> Machine:
    """Return the CPU. Every CPU has the key "cpu", because no gated metric depends on its model."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(key="cpu", name=_cpu_name(), memory_bytes=memory)


@functools.cache
def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({os.cpu_count()} logical cores)"
    return f"{platform.machine()} ({os.cpu_count()} logical cores)"


def stack(device: Literal["cpu", "cuda"]) -> dict[str, str]:
    """Return the installed versions of packages that can change a metric, and the driver on a GPU."""
    versions = {}
    for package in STACK_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    gpus = visible_gpus()
    if device == "cuda" and gpus:
        versions["driver"] = gpus[0]["driver"]
        versions |= _cuda_of_torch()
    return versions


@functools.cache
def _cuda_of_torch() -> dict[str, str]:
    """Return the CUDA version that the installed torch was built for, from its version file: importing torch would take seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    with contextlib.suppress(OSError):
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
        match = re.search(r"^cuda\b[^=]*= *'([\d.]+)'", text, re.MULTILINE)
        if match:
            return {"cuda": match[1]}
    return {}


def named_commit() -> str | None:
    """Return the commit that the environment variable HPC_CORE_COMMIT names, in lower case; None without one.

    Raises:
        SpecError: it is no hash of a commit.
    """
    given = os.environ.get(_COMMIT, "").strip()
    if given and not _HASH.fullmatch(given):
        raise SpecError(
            f"{_COMMIT}={given!r} is no commit: set its hash, 7 to 64 hexadecimal digits (git rev-parse HEAD), or unset it."
        )
    return given.lower() or None


def commit(folder: str = ".") -> tuple[str | None, bool | None]:
    """Return the commit that runs, and whether its code was changed since; (None, None) where git cannot tell both.

    That is so outside a repository, before its first commit, and without git.

    The environment variable HPC_CORE_COMMIT takes precedence. It is for trees that were copied without their repository; whether such
    a tree was changed is unknown, so the second value is then None, unless git has just that commit. `git.changed_code` defines what
    counts as a change: baselines that the run itself writes do not.

    Raises:
        SpecError: as `named_commit`.
    """
    given = named_commit()
    found = head(Path(folder))
    if given and (found is None or not found.startswith(given)):
        return given, None
    if found is None:
        return None, None
    try:
        return found, bool(changed_code(Path(folder)))
    except RepositoryError:
        return None, None


def gpu_state() -> dict[str, Any]:
    """Return `gpu_state.read_state` of the first visible GPU, and its uuid; {} without one."""
    gpus = visible_gpus()
    return {"uuid": gpus[0]["uuid"], **read_state(gpus[0]["index"])} if gpus else {}


def gpu_energy_mj() -> int:
    """Return the millijoules that the first visible GPU's board consumed since its driver was loaded.

    Raises:
        MeasureError: there is no GPU, or it has no energy counter.
    """
    gpus = visible_gpus()
    if not gpus:
        raise MeasureError("NVML sees no GPU, so there is no energy to read.")
    return read_energy_mj(gpus[0]["index"])


def circumstances(
    device: Literal["cpu", "cuda"],
    launched: Literal["warm", "exec", "inline"],
    *,
    ceilings: dict[str, float] | None = None,
    fault: str | None = None,
    started_at: datetime.datetime | None = None,
    where: Machine | None = None,
    **observed: Any,
) -> Circumstances:
    """Return everything around a run that could explain a number.

    Keyword arguments add what the run itself observed (`gpu=`, `phase_s=`, `notes=`). `where` is the machine that was predicted for, in
    place of this one.
    """
    revision, dirty = commit()
    when = started_at or datetime.datetime.now(datetime.UTC)
    return Circumstances(
        machine=where or machine(device),
        stack=stack(device),
        settings=settings(),
        python=platform.python_version(),
        host_cpu=_cpu_name(),
        launched=launched,
        started_at=when.isoformat(timespec="seconds"),
        commit=revision,
        dirty=dirty,
        ceilings=ceilings or {},
        fault=fault,
        **observed,
    )
