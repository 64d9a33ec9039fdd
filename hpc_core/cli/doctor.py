"""`hpc-core doctor`: check what hpc-core needs of this machine, and name the command that installs what is missing.

It checks what only hpc-core knows. `python -m torch.utils.collect_env` and `python -m bitsandbytes` describe the libraries.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from hpc_core.cli.console import say, say_json
from hpc_core.gate.exit_code import ExitCode
from hpc_core.record import units as sizes
from hpc_core.record.environment import machine, visible_gpus
from hpc_core.record.gpu_state import read_state, setup_notes, throttle_words
from hpc_core.record.record import Machine
from hpc_core.record.version import __version__

State = Literal["ok", "note", "missing", "too old", "broken"]
_PURPOSES = {
    "run": "building, running and predicting every case",
    "quantization": "quantized weights and 8-bit optimizers",
    "int4": "int4 weights",
    "liger": "fusion='liger' of the tuned training engine, on a GPU",
    "hub": "data sets from the hub",
    "gguf": "the small true model, SmolLM2-135M",
    "report": "the report as a page, and charts",
}
"""What each extra is for."""
_PROFILERS = ("nsys", "ncu")
_READINGS = (("sm_clock_mhz", "MHz"), ("memory_clock_mhz", "MHz memory"), ("temperature_c", "°C"), ("power_w", "W"))
_TORCH_PAGE = "https://pytorch.org/get-started/locally"
_ASK_TORCH = """
import json, torch
devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
if devices:
    torch.zeros(1, device="cuda")  # only this notices a driver that is too old
print("\\n" + json.dumps({"cuda": torch.version.cuda, "devices": devices}))
"""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was checked."""

    name: str
    state: State
    seen: str
    advice: str = ""
    """What to do; empty if nothing."""
    needed: bool = True
    """Whether the suite cannot do its work without it."""

    @property
    def good(self) -> bool:
        """Whether nothing must be done."""
        return self.state in ("ok", "note") or (self.state == "missing" and not self.needed)


def doctor(
    baselines: Annotated[Path, typer.Option("--baselines", help="The folder of baselines.")] = Path("baselines"),
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds that torch may take to find the GPU.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Check the GPU and its state, the stack, the compiler and the baselines. Exit code 1: something must be done."""
    gpus, gpu_check = _gpus()
    found = machine("cuda") if gpus else machine("cpu")
    checks = [gpu_check, *_libraries()]
    if gpus:
        checks.append(_torch_sees_gpu(limit))
    checks += [*_tools(bool(gpus)), _baselines(baselines, found)]
    good = all(check.good for check in checks)
    if as_json:
        say_json(
            {
                "version": __version__,
                "python": platform.python_version(),
                "machine": msgspec.to_builtins(found),
                "gpus": gpus,
                "checks": msgspec.to_builtins(checks),
                "ok": good,
            }
        )
    else:
        say(f"hpc-core {__version__}, Python {platform.python_version()}, {found.name} [{found.key}]")
        for line in [*_gpu_lines(gpus), *_check_lines(checks)]:
            say(line)
    if not good:
        raise typer.Exit(ExitCode.FAILED)


def _gpus() -> tuple[list[dict[str, Any]], Check]:
    """Return the visible GPUs, with their `state` and `users` now, and whether NVML answers."""
    import pynvml

    without = (
        "Tiny and small cases run on the CPU, full-size ones are predicted: hpc-core predict CASE, pytest --benchmark."
    )
    try:
        gpus = [
            {**gpu, "state": read_state(gpu["index"]), "users": _users(pynvml, gpu["index"])} for gpu in visible_gpus()
        ]
    except pynvml.NVMLError as error:
        advice = f"NVIDIA's driver does not answer: see nvidia-smi. {without}"
        return [], Check(name="GPU", state="broken", seen=str(error), advice=advice)
    if gpus:
        names = ", ".join(str(gpu["name"]) for gpu in gpus)
        return gpus, Check(name="GPU", state="ok", seen=f"{names}, driver {gpus[0]['driver']}")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    advice = without if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} may hide it: unset it. {without}"
    return [], Check(name="GPU", state="note", seen="none is visible", advice=advice)


def _users(pynvml: Any, index: int) -> list[dict[str, Any]]:
    pynvml.nvmlInit()
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(index))
        # Inside a container the driver hides how much another process holds.
        return [{"pid": int(each.pid), "used_bytes": each.usedGpuMemory} for each in running]
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def _libraries() -> Iterator[Check]:
    """Check the packages of every extra against the versions that hpc-core's own metadata asks for. Imports none of them."""
    from packaging.requirements import Requirement  # pytest's own, and slow to import

    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("hpc-core") or []]
    except importlib.metadata.PackageNotFoundError:
        advice = "Install it, so that its extras are known: pip install 'hpc-core[run]'."
        yield Check(name="hpc-core", state="note", seen="imported from a folder, not installed", advice=advice)
        return
    for extra, purpose in _PURPOSES.items():
        for needed in requirements:
            if needed.marker is None or needed.name == "hpc-core" or not needed.marker.evaluate({"extra": extra}):
                continue
            install = f"For {purpose}: pip install -U 'hpc-core[{extra}]'."
            try:
                version = importlib.metadata.version(needed.name)
            except importlib.metadata.PackageNotFoundError:
                state: State = "missing"
                version = "not installed"
            else:
                state = "ok" if needed.specifier.contains(version, prereleases=True) else "too old"
                version += f", needs {needed.specifier}" if state == "too old" else ""
            yield Check(
                name=needed.name,
                state=state,
                seen=version,
                advice="" if state == "ok" else install,
                needed=extra == "run",
            )


def _torch_sees_gpu(limit_s: float) -> Check:
    """Ask torch, in a process of its own, to use the GPU that NVML sees."""
    advice = f"torch cannot use the GPU. Install a CUDA build, or one for the driver's CUDA: {_TORCH_PAGE}."
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH], capture_output=True, text=True, timeout=limit_s, check=False
        )
        answer = json.loads((ran.stdout.splitlines() or [""])[-1])
    except subprocess.TimeoutExpired:
        seen = f"importing torch and finding the GPU took longer than {limit_s:.0f} s"
    except ValueError:
        seen = (ran.stderr.strip().splitlines() or [f"it ended with exit code {ran.returncode}"])[-1]
    else:
        build = f"CUDA {answer['cuda']}" if answer["cuda"] else "a CPU build"
        if answer["devices"]:
            return Check(name="GPU in torch", state="ok", seen=f"{answer['devices']} visible, {build}")
        seen = f"none visible, {build}"
    return Check(name="GPU in torch", state="broken", seen=seen, advice=advice)


def _tools(gpu: bool) -> Iterator[Check]:
    wanted = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[
        0
    ]  # as predictions choose it
    compiler = shutil.which(wanted)
    yield Check(
        name="C++ compiler",
        state="missing" if compiler is None else "ok",
        seen=compiler or f"{wanted} is not found",
        advice="" if compiler else "Predictions need one, once: apt-get install g++, or name another in CXX.",
        needed=False,
    )
    for name in _PROFILERS if gpu else ():
        path = shutil.which(name)
        advice = "" if path else "For hpc-core profile's command line: NVIDIA's Nsight tools, part of the CUDA toolkit."
        yield Check(name=name, state="ok" if path else "missing", seen=path or "not found", advice=advice, needed=False)


def _baselines(folder: Path, found: Machine) -> Check:
    number = len(list((folder / found.key).glob("*/*.json")))
    if number:
        return Check(name="baselines", state="ok", seen=f"{number} in {folder / found.key}")
    advice = f'Nothing can be judged yet. Accept this machine\'s: pytest --benchmark --perf-update --reason "first on {found.key}".'
    return Check(name="baselines", state="note", seen=f"none in {folder / found.key}", advice=advice)


def _check_lines(checks: list[Check]) -> Iterator[str]:
    width = max(len(check.name) for check in checks)
    for check in checks:
        word = "absent" if check.state == "missing" and check.good else check.state
        yield f"  {check.name:<{width}}  {word:<8}  {check.seen}"
    must = [f"  {check.name}: {check.advice}" for check in checks if check.advice and not check.good]
    yield ""
    yield from ["To do:", *must] if must else ["Nothing must be done."]
    optional = [f"  {check.name}: {check.advice}" for check in checks if check.advice and check.good]
    yield from ["Worth knowing:", *optional] if optional else []
    yield "More of the libraries: python -m torch.utils.collect_env, python -m bitsandbytes."


def _gpu_lines(gpus: list[dict[str, Any]]) -> Iterator[str]:
    """Describe each GPU and whatever makes times on it doubtful."""
    for gpu in gpus:
        state: Mapping[str, Any] = gpu["state"]
        total = int(gpu["memory_bytes"])
        free = sizes.quantity(total - int(state["used_bytes"]), "bytes") if "used_bytes" in state else "unknown"
        memory = f"{free} free of {sizes.quantity(total, 'bytes')}"
        yield f"  GPU {gpu['index']}: {gpu['name']}, {memory}, driver {gpu['driver']}"
        readings = [f"{state[name]} {unit}" for name, unit in _READINGS if name in state]
        if readings:
            yield f"    now: {', '.join(readings)}"
        yield from (f"    {note}" for note in setup_notes(state))
        yield from (f"    held down by: {word}" for word in throttle_words(int(state.get("throttle_reasons", 0))))
        for user in gpu["users"]:
            used = user["used_bytes"]
            held = "an unknown amount" if used is None else sizes.quantity(int(used), "bytes")
            yield f"    used by process {user['pid']}: {held}. Times on a shared GPU are not gated."
