"""Measure whether +2 % of GPU-busy time is detected and no change passes. Takes about four minutes on an H100; not part of a suite.

    python -m bench.studies.detection.detection --out detection.json

Runs a step of full fine-tuning on eight layers of Llama-3.2-3B in fresh processes, alternately unchanged and with one more kernel, which spins
for 2 % of the step's time. `tests/studies/test_evidence.py` draws processes from its output and judges them as an A/B does.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from hpc_core.case.case import Case
from hpc_core.case.workloads import CallableSpec
from hpc_core.catalogue import finetune, full, llama_3b
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Job, Retime
from hpc_core.record.record import Record

LAYERS = 8
SHARE = 0.02
_CALIBRATION_CYCLES = 100_000_000


def make_step(spin_s: float, *, device: str) -> Callable[[], None]:
    """Return one training step, followed by a kernel that spins for this many seconds; no kernel for 0."""
    from hpc_core.builders.assemble import build
    from hpc_core.engines.finetune import finetune_program

    torch: Any = importlib.import_module("torch")  # untyped in parts, and not imported where only the driver runs
    model = msgspec.structs.replace(llama_3b, layers=LAYERS)
    case = finetune(model, full, variant="full-8-layers", prefix="llama-3.2-3b", batch=4, length=512)
    workload: Any = case.workload
    program = finetune_program(build(case, torch.device(device)), case, workload)
    cycles = round(spin_s * _cycles_per_s()) if spin_s else 0

    def step() -> None:
        program.step()
        if cycles:
            torch.cuda._sleep(cycles)

    return step


def _cycles_per_s() -> float:
    """Return the cycles per second of the spinning kernel, after one call that raises the clock rate."""
    torch: Any = importlib.import_module("torch")
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    begin.record()
    torch.cuda._sleep(_CALIBRATION_CYCLES)
    end.record()
    torch.cuda.synchronize()
    return float(_CALIBRATION_CYCLES / (begin.elapsed_time(end) / 1000))


def _case(spin_s: float) -> Case:
    arguments = {"spin_s": spin_s}
    spec = CallableSpec(
        factory="bench.studies.detection.detection:make_step", arguments=arguments, steps=10, device="cuda"
    )
    return Case(id=f"own/{'spinning' if spin_s else 'clean'}", scale="full", workload=spec)


def _busy_s(record: Record) -> float:
    if record.status != "ok":
        raise SystemExit(f"{record.case.id} is {record.status}: {record.failure or record.reasons}")
    return float(record.metrics["busy_s"].value)


def main() -> None:
    """Run the processes one after another, and write all busy times after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=20, help="a side")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with Launcher("warm") as launcher:
        first = launcher.run(Job(case=_case(0), kind=Retime()))
        spin_s = SHARE * _busy_s(first)
        clean: list[float] = []
        spinning: list[float] = []
        for number in range(asked.processes):
            for side, case in ((clean, _case(0)), (spinning, _case(spin_s)))[:: 1 if number % 2 == 0 else -1]:
                side.append(_busy_s(launcher.run(Job(case=case, kind=Retime()))))
            seen = first.circumstances
            found = {
                "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "machine": seen.machine.key,
                "gpu_uuid": seen.gpu.get("after", {}).get("uuid"),
                "stack": seen.stack,
                "work": f"full fine-tuning, {LAYERS} layers of llama-3.2-3b, 4 x 512, bfloat16",
                "unchanged_busy_s": _busy_s(first),
                "spin_s": spin_s,
                "clean_busy_s": clean,
                "spinning_busy_s": spinning,
            }
            asked.out.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
            sys.stderr.write(f"{number + 1}: {clean[-1] * 1000:.3f} ms, {spinning[-1] * 1000:.3f} ms\n")


if __name__ == "__main__":
    main()
