"""The whole examination: the machine, its GPUs and who uses them, the stack, the tools, the ceilings that are known."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import msgspec

import hpc_core
from hpc_core.baselines.history import accepted_records
from hpc_core.bounds.datasheet import datasheet
from hpc_core.case.errors import BaselineError
from hpc_core.cli.doctor_checks.checks import (
    LIBRARIES,
    Check,
    check_bitsandbytes,
    check_gpu,
    check_library,
    check_torch,
)
from hpc_core.cli.doctor_checks.children import Told, ask
from hpc_core.record.record import Machine

__all__ = ["Examination", "examine"]

_COMPILERS = ("c++", "g++", "clang++")
_PROFILERS = ("nsys", "ncu")


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """What was found."""

    version: str
    python: str
    machine: Machine | None
    gpus: tuple[dict[str, Any], ...]
    """As `environment.visible_gpus`, with `state` (of `gpu_state.read_state`) and `users`: process ids and bytes."""
    checks: tuple[Check, ...]
    ceilings: dict[str, float]
    """Measured on this kind of machine, by the accepted record that was measured last: FLOP/s and bytes/s."""
    datasheet: dict[str, float]
    """What the maker says, in the same words; {} for a card without a sheet here."""

    @property
    def good(self) -> bool:
        """Whether nothing that is needed is missing or broken."""
        return all(check.good for check in self.checks)


def examine(baselines: Path, *, limit_s: float = 120.0) -> Examination:
    """Look at everything; no library is imported into this process, and each gets `limit_s` seconds."""
    told = ask(["gpus", *(library.name for library in LIBRARIES)], limit_s=limit_s)
    gpus = tuple(told["gpus"].answer.get("gpus", []))
    machine = _machine(told["gpus"])
    return Examination(
        version=hpc_core.__version__,
        python=platform.python_version(),
        machine=machine,
        gpus=gpus,
        checks=(*_checks(told, bool(gpus)), *_tools(bool(gpus))),
        ceilings={} if machine is None else _ceilings(baselines, machine.key),
        datasheet={} if machine is None else _sheet(machine),
    )


def _machine(told: Told) -> Machine | None:
    said = told.answer.get("machine")
    return None if said is None else msgspec.convert(said, Machine)


def _checks(told: dict[str, Told], gpu: bool) -> list[Check]:
    least = _least_versions()
    found = {each.name: check_library(each, told[each.name], least.get(each.name)) for each in LIBRARIES}
    found["torch"] = check_torch(found["torch"], told["torch"], gpu=gpu)
    found["bitsandbytes"] = check_bitsandbytes(found["bitsandbytes"], told["bitsandbytes"])
    return [check_gpu(told["gpus"], os.environ.get("CUDA_VISIBLE_DEVICES")), *found.values()]


def _least_versions() -> dict[str, str]:
    """The oldest version of each package that hpc-core's own metadata asks for."""
    from packaging.requirements import InvalidRequirement, Requirement  # pytest's own, and slow to import

    found: dict[str, str] = {}
    try:
        said = importlib.metadata.requires("hpc-core") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for text in said:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        for part in requirement.specifier:
            if part.operator == ">=":
                found.setdefault(requirement.name, part.version)
    return found


def _tools(gpu: bool) -> list[Check]:
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    checks = [
        Check(
            name="C++ compiler",
            state="missing" if compiler is None else "ok",
            seen=compiler or "none found",
            advice="" if compiler else "Predictions need one, once: apt-get install g++, or your system's package.",
            needed=False,
        )
    ]
    for name in _PROFILERS if gpu else ():
        path = shutil.which(name)
        advice = "" if path else "For hpc-core profile's command line: NVIDIA's Nsight tools, part of the CUDA toolkit."
        checks.append(
            Check(name=name, state="ok" if path else "missing", seen=path or "not found", advice=advice, needed=False)
        )
    return checks


def _ceilings(baselines: Path, key: str) -> dict[str, float]:
    """Those of the accepted record of this kind of machine that was measured last."""
    newest: tuple[str, dict[str, float]] = ("", {})
    for path in sorted((baselines / key).glob("*/*.json")):
        try:
            records = accepted_records(baselines, key, f"{path.parent.name}/{path.stem}")
        except BaselineError:
            continue
        for record in records:
            seen = record.circumstances
            if seen.ceilings and seen.started_at > newest[0]:
                newest = (seen.started_at, dict(seen.ceilings))
    return newest[1]


def _sheet(machine: Machine) -> dict[str, float]:
    sheet = datasheet(machine)
    if sheet is None:
        return {}
    rates = {f"matmul_{name}_flop_per_s": rate for name, rate in sheet.flop_per_s.items()}
    return rates | {"copy_bytes_per_s": sheet.bytes_per_s}
