"""`hpc-core doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from hpc_core.cli.console import say, say_json
from hpc_core.cli.doctor_checks.checks import Check
from hpc_core.cli.doctor_checks.examination import Examination, examine
from hpc_core.gate.exit_code import ExitCode
from hpc_core.record import units as sizes
from hpc_core.record.gpu_state import setup_notes, throttle_words

__all__ = ["doctor"]


def doctor(
    baselines: Annotated[Path, typer.Option("--baselines", help="The folder of baselines, for known ceilings.")] = Path(
        "baselines"
    ),
    limit: Annotated[float, typer.Option(min=1.0, help="Seconds that one library may take to be imported.")] = 120.0,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON.")] = False,
) -> None:
    """Say what GPU, driver and stack there are, who else uses the GPU, what is missing and how to get it. Exit code 1: something must be done."""
    found = examine(baselines, limit_s=limit)
    if as_json:
        said = {**msgspec.to_builtins(found), "ok": found.good}
        say_json(said)
    else:
        for line in _lines(found):
            say(line)
    if not found.good:
        raise typer.Exit(ExitCode.FAILED)


def _lines(found: Examination) -> list[str]:
    where = "this machine" if found.machine is None else f"{found.machine.name} [{found.machine.key}]"
    lines = [f"hpc-core {found.version}, Python {found.python}, {where}"]
    for gpu in found.gpus:
        lines += _gpu(gpu)
    width = max(len(check.name) for check in found.checks)
    lines += [f"  {check.name:<{width}}  {_word(check):<8}  {check.seen}" for check in found.checks]
    lines += _known("ceilings measured here", found.ceilings) + _known("the data sheet's", found.datasheet)
    todo = [f"{check.name}: {check.advice}" for check in found.checks if check.advice and not check.good]
    could = [f"{check.name}: {check.advice}" for check in found.checks if check.advice and check.good]
    lines += ["", "To do:", *(f"  {line}" for line in todo)] if todo else ["", "Nothing must be done."]
    return lines + (["Worth knowing:", *(f"  {line}" for line in could)] if could else [])


def _word(check: Check) -> str:
    return "absent" if check.state == "missing" and check.good else check.state


def _gpu(gpu: Mapping[str, Any]) -> list[str]:
    state = gpu.get("state", {})
    total, used = int(gpu["memory_bytes"]), int(state.get("used_bytes", 0))
    free = sizes.quantity(total - used, "bytes") if "used_bytes" in state else "unknown"
    lines = [
        f"  GPU {gpu['index']}: {gpu['name']}, {free} free of {sizes.quantity(total, 'bytes')}, driver {gpu['driver']}"
    ]
    clocks = [f"{state[name]} {unit}" for name, unit in _READINGS if name in state]
    if clocks:
        lines.append(f"    now: {', '.join(clocks)}")
    lines += [f"    {note}" for note in setup_notes(state)]
    lines += [f"    held down by: {word}" for word in throttle_words(int(state.get("throttle_reasons", 0)))]
    for user in gpu.get("users", []):
        used_bytes = user.get("used_bytes")
        held = "an unknown amount" if used_bytes is None else sizes.quantity(int(used_bytes), "bytes")
        lines.append(f"    used by process {user['pid']}: {held}. Times on a shared GPU are not gated.")
    return lines


_READINGS = (("sm_clock_mhz", "MHz"), ("memory_clock_mhz", "MHz memory"), ("temperature_c", "°C"), ("power_w", "W"))


def _known(title: str, rates: Mapping[str, float]) -> list[str]:
    if not rates:
        return []
    said = [
        f"{name.removesuffix('_per_s').removesuffix('_flop').removesuffix('_bytes')} {_rate(name, rate)}"
        for name, rate in sorted(rates.items())
    ]
    return [f"  {title}: {', '.join(said)}"]


def _rate(name: str, rate: float) -> str:
    return f"{rate / 1e12:.3g} {'TB/s' if 'bytes' in name else 'TFLOP/s'}"
