"""From what the libraries told to what is right, what is not, and what to do. Pure: asks nobody."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from hpc_core.cli.doctor_checks.children import Told

__all__ = ["LIBRARIES", "Check", "Library", "State", "check_bitsandbytes", "check_gpu", "check_library", "check_torch"]

State = Literal["ok", "note", "missing", "too old", "broken"]
_TORCH_PAGE = "https://pytorch.org/get-started/locally"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

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


class Library(msgspec.Struct, frozen=True, kw_only=True):
    """A package that cases or commands use."""

    name: str
    extra: str
    """The extra of hpc-core that brings it, or the package itself."""
    purpose: str
    needed: bool = False

    @property
    def install(self) -> str:
        """The command that gets it."""
        return f"pip install 'hpc-core[{self.extra}]'" if self.extra != self.name else f"pip install {self.name}"


LIBRARIES: tuple[Library, ...] = (
    Library(name="torch", extra="run", purpose="runs and predicts every case", needed=True),
    Library(name="transformers", extra="run", purpose="builds the models", needed=True),
    Library(name="peft", extra="run", purpose="LoRA and QLoRA", needed=True),
    Library(name="accelerate", extra="run", purpose="the Trainer, and weights from a folder or hub", needed=True),
    Library(name="bitsandbytes", extra="quantization", purpose="quantized weights and 8-bit optimizers"),
    Library(name="torchao", extra="int4", purpose="int4 weights"),
    Library(name="liger-kernel", extra="liger", purpose="fusion='liger' of the tuned training engine, on a GPU"),
    Library(name="datasets", extra="hub", purpose="data sets from the hub"),
    Library(name="gguf", extra="gguf", purpose="the small true model, SmolLM2-135M"),
    Library(name="matplotlib", extra="plots", purpose="pictures"),
    Library(name="triton", extra="triton", purpose="torch.compile and kernels of one's own, on a GPU"),
)


def check_library(library: Library, told: Told, least: str | None) -> Check:
    """Whether a package is there, can be imported and is new enough; `least` is the oldest version that will do."""
    absent = told.missing.replace("_", "-") == library.name
    if told.missing and not absent:
        advice = f"{library.name} needs {told.missing}, which is not installed: pip install {told.missing}."
        return _check(library, "broken", told.error, advice)
    if absent:
        return _check(library, "missing", "not installed", f"For {library.purpose}: {library.install}.")
    if told.error:
        advice = f"{library.name} is installed and cannot be imported. Install it anew: pip install --force-reinstall {library.name}."
        return _check(library, "broken", told.error, advice)
    version = str(told.answer.get("version", "unknown"))
    if least is not None and _older(version, least):
        advice = f"hpc-core needs {library.name} {least} or newer: pip install -U '{library.name}>={least}'."
        return _check(library, "too old", version, advice)
    return _check(library, "ok", version, "")


def _check(library: Library, state: State, seen: str, advice: str) -> Check:
    return Check(name=library.name, state=state, seen=seen, advice=advice, needed=library.needed)


def _older(version: str, least: str) -> bool:
    from packaging.version import InvalidVersion, Version  # pytest's own, and slow to import

    try:
        return Version(version).release < Version(least).release
    except InvalidVersion:
        return False


def check_torch(found: Check, told: Told, *, gpu: bool) -> Check:
    """More of torch, if it is there: whether its build and the driver fit the machine."""
    if found.state != "ok":
        return found
    answer = told.answer
    build = f"CUDA {answer['cuda']}" if answer.get("cuda") else "a CPU build"
    seen = f"{found.seen}, {build}"
    change = msgspec.structs.replace
    if not gpu:
        return change(found, seen=seen)
    if not answer.get("cuda"):
        advice = f"The machine has a GPU and this torch cannot use it. Install a CUDA build: {_TORCH_PAGE}."
        return change(found, state="broken", seen=seen, advice=advice)
    if answer.get("cuda_error") or not answer.get("devices"):
        why = answer.get("cuda_error", "it sees no GPU")
        advice = f"torch cannot use the GPU. Update the driver, or install a torch for an older CUDA: {_TORCH_PAGE}."
        return change(found, state="broken", seen=f"{seen}: {why}", advice=advice)
    return change(found, seen=seen)


def check_bitsandbytes(found: Check, told: Told) -> Check:
    """Whether it can quantize, if it is there: it imports without its compiled library, and fails at the first weight."""
    trouble = told.answer.get("quantize_error", "")
    if found.state != "ok":
        return found
    if trouble:
        device = told.answer.get("device", "this machine's device")
        advice = (
            f"It imports but cannot quantize on {device}: its compiled library is missing or was built for another CUDA. "
            "Install it anew (pip install --force-reinstall --no-deps bitsandbytes), and look at: python -m bitsandbytes."
        )
        return msgspec.structs.replace(found, state="broken", seen=f"{found.seen}: {trouble}", advice=advice)
    return msgspec.structs.replace(found, seen=f"{found.seen}, quantizes on {told.answer.get('device')}")


def check_gpu(told: Told, hidden: str | None) -> Check:
    """Whether a GPU is visible, and what a machine without one can do; `hidden` is CUDA_VISIBLE_DEVICES, if set."""
    gpus: list[Mapping[str, Any]] = told.answer.get("gpus", [])
    if gpus:
        named = ", ".join(str(gpu["name"]) for gpu in gpus)
        return Check(name="GPU", state="ok", seen=f"{named}, driver {gpus[0]['driver']}")
    can = (
        "Tiny and small cases run on the CPU, full-size ones are predicted: hpc-core predict CASE, pytest --benchmark."
    )
    if told.error:
        return Check(
            name="GPU",
            state="broken",
            seen=told.error,
            advice=f"NVIDIA's driver does not answer: see nvidia-smi. {can}",
        )
    if hidden is not None:
        advice = f"CUDA_VISIBLE_DEVICES={hidden!r} may hide it: unset it. {can}"
        return Check(name="GPU", state="note", seen="none is visible", advice=advice)
    return Check(name="GPU", state="note", seen="none is visible", advice=can)
