"""Measure how busy time follows the SM clock, and whether the gate's bound holds. At most 150 s on an H200; not part of a suite.

    python -m bench.studies.clocks.clocks --out clocks.json

Runs steps under loads that give the same code other clocks: with pauses, back to back, and right after matrix products that run
into the power cap. Every step has its own busy time, by family of kernels, and its own mean clock. Two checks of the clock
itself: kernels that spin for a known number of cycles stand around each step, and the gate's own reading is taken with and
without the thread that samples the clock.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hpc_core.builders.assemble import build
from hpc_core.catalogue import catalogue
from hpc_core.engines.engine import engine_of
from hpc_core.instruments.kernels import Interval, device_activity, family, recorded, sorted_events, union_s
from hpc_core.instruments.sm_clock import ClockWatch
from hpc_core.record.environment import gpu_state
from hpc_core.record.gpu_state import POWER_CAP

CASES = (
    "llama-3.2-3b/lora-tuned",
    "llama-3.2-3b/lora-nodrop",
    "llama-3.2-3b/generate-bf16-graph",
    "llama-3.2-3b/qlora-tuned",
)
PAUSES = {"pauses of two steps": 2, "pauses of a step": 1}
LOADS = (*PAUSES, "back to back", "after products")
_ROUNDS = 3
_BLOCK_S = 0.3
_SETTLE_S = 0.25
_NEW_TOKENS = 33
_BURN_S = 0.1
_SPIN_CYCLES = 200_000
_EDGE = 8192
_COPY_BYTES = 2**31
_LEAST_READINGS = 3
_GATE_STEPS = 5
_STEP_NEEDS_S = 35.0
"""What a case takes at most, its build included; a case that would end after the limit is left out."""
_spin: Any = torch.cuda._sleep
Step = Callable[[], object]
Row = dict[str, Any]


def repeated(step: Step, count: int) -> Callable[[], None]:
    """Return a step that runs another one so many times."""

    def steps() -> None:
        for _ in range(count):
            step()

    return steps


class Products:
    """A queue of matrix products: the load with the highest power."""

    def __init__(self) -> None:
        self._left, self._right = (torch.randn(_EDGE, _EDGE, device="cuda").bfloat16() for _ in range(2))
        self._out = torch.empty_like(self._left)
        self.step()
        torch.cuda.synchronize()
        began = time.perf_counter()
        self.queue(0.1, each_s=2 * _EDGE**3 / 6e14)
        torch.cuda.synchronize()
        self._each_s = (time.perf_counter() - began) / max(1, round(0.1 / (2 * _EDGE**3 / 6e14)))

    def step(self) -> None:
        """Queue one product."""
        torch.mm(self._left, self._right, out=self._out)

    def queue(self, seconds: float, *, each_s: float | None = None) -> None:
        """Queue products for about so many seconds."""
        for _ in range(max(1, round(seconds / (each_s or self._each_s)))):
            self.step()


def _before(load: str, step_s: float, products: Products) -> None:
    """Do what the load does before each step."""
    if load == "after products":
        products.queue(_BURN_S)
    elif load in PAUSES:
        torch.cuda.synchronize()
        time.sleep(step_s * PAUSES[load])


def block(step: Step, step_s: float, load: str, products: Products) -> list[Row]:
    """Return one row for each of some steps under a load that has settled."""
    device = torch.device("cuda", 0)
    settle = max(1, round(_SETTLE_S / step_s))
    for _ in range(settle):
        _before(load, step_s, products)
        step()
    count = max(4, round(_BLOCK_S / step_s))
    begins = list[int]()

    def work() -> None:
        begins.append(time.time_ns())
        _spin(_SPIN_CYCLES)  # gives the offset of the profiler's clock
        torch.cuda.synchronize()
        for _ in range(count):
            _before(load, step_s, products)
            _spin(_SPIN_CYCLES)
            step()
            _spin(_SPIN_CYCLES)

    with ClockWatch(interval_s=0.002) as watch:
        intervals, _ = sorted_events(recorded(work, device))
    return steps_of(intervals, watch.readings, begins[0])


def steps_of(intervals: Sequence[Interval], readings: Sequence[tuple[int, int, int]], began_ns: int) -> list[Row]:
    """Return the steps between pairs of spinning kernels, each with its busy time, its clock by NVML and by the two kernels.

    The first and the last record are the profiler's sentinels; the second one began at `began_ns` by the host's clock.
    """
    ordered = sorted(intervals, key=lambda one: one.start_ns)[1:-1]
    offset = ordered[0].start_ns - began_ns
    spins = [at for at, one in enumerate(ordered) if "spin_kernel" in one.name][1:]
    rows = []
    for first, last in zip(spins[::2], spins[1::2], strict=True):
        inside = ordered[first + 1 : last]
        since, until = ordered[first].end_ns, ordered[last].start_ns
        read = [(mhz, bits) for at, mhz, bits in readings if since <= at + offset <= until]
        if len(read) < _LEAST_READINGS:
            continue
        seconds: defaultdict[str, float] = defaultdict(float)
        for one in inside:
            seconds[family(one.name) if one.kind == "kernel" else one.kind] += (one.end_ns - one.start_ns) / 1e9
        rows.append(
            {
                "mhz": statistics.fmean(mhz for mhz, _ in read),
                "least_mhz": min(mhz for mhz, _ in read),
                "most_mhz": max(mhz for mhz, _ in read),
                "readings": len(read),
                "capped": statistics.fmean(bool(bits & POWER_CAP) for _, bits in read),
                "spin_mhz": [1e3 * _SPIN_CYCLES / (ordered[at].end_ns - ordered[at].start_ns) for at in (first, last)],
                "busy_s": union_s(inside),
                "families": dict(seconds),
            }
        )
    return rows


def gate_rows(step: Step, step_s: float, products: Products) -> Iterator[Row]:
    """Yield what the gate itself would read of some steps, cool and heated up, with and without the thread that samples."""
    device = torch.device("cuda", 0)
    for number in range(4):
        heated = number % 2 == 1
        if heated:
            products.queue(0.8)
        else:
            torch.cuda.synchronize()
            time.sleep(0.8)
        watches = (ClockWatch(), None) if number % 4 < 2 else (None, ClockWatch())
        for watch in watches:
            activity = device_activity(repeated(step, _GATE_STEPS), device, watch=watch)
            clock = None if watch is None else watch.clock()
            yield {
                "heated": heated,
                "sampled": watch is not None,
                "busy_s": activity.busy_s / _GATE_STEPS,
                "mhz": None if clock is None else clock.mean_mhz,
                "readings": None if clock is None else clock.readings,
                "capped": None if clock is None else clock.capped,
            }


def slope(rows: Sequence[Row], seconds: Callable[[Row], float]) -> tuple[float, float]:
    """Return how log time follows -log clock, 1 for cycles and 0 for none, by least squares; and its standard error.

    NaN where the clocks hardly differ.
    """
    points = [(-math.log(row["mhz"]), math.log(seconds(row))) for row in rows if seconds(row) > 0]
    if len(points) < 3:
        return math.nan, math.nan
    mean_x, mean_y = (statistics.fmean(values) for values in zip(*points, strict=True))
    squares = sum((x - mean_x) ** 2 for x, _ in points)
    if squares < len(points) * 0.003**2:
        return math.nan, math.nan
    found = sum((x - mean_x) * (y - mean_y) for x, y in points) / squares
    rest = sum((y - mean_y - found * (x - mean_x)) ** 2 for x, y in points)
    return found, math.sqrt(rest / (len(points) - 2) / squares)


def worst_of_law(rows: Sequence[Row]) -> float:
    """Return by how much time grew beyond the ratio of clocks, in log ratio, at most over pairs of loads' medians; 0 or less is lawful."""
    by_load = defaultdict(list)
    for row in rows:
        by_load[row["load"]].append(row)
    points = [
        (statistics.median(row["mhz"] for row in group), statistics.median(row["busy_s"] for row in group))
        for group in by_load.values()
    ]
    beyond = [
        max(math.log(slow_s / fast_s), 0.0) - math.log(fast / slow)
        for slow, slow_s in points
        for fast, fast_s in points
        if fast > slow
    ]
    return max(beyond, default=math.nan)


def measure(name: str, step: Step, products: Products, *, gate: bool) -> Mapping[str, Any]:
    """Measure one work under all loads, in an order that no drift favours."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    step_s = (time.perf_counter() - began) / 3
    rows: list[Row] = []
    for number in range(_ROUNDS if gate else 1):
        for load in LOADS if number % 2 == 0 else LOADS[::-1]:
            rows += [{"load": load, "round": number, **row} for row in block(step, step_s, load, products)]
    found: dict[str, Any] = {"step_s": step_s, "steps": rows}
    if gate:
        found["gate"] = list(gate_rows(step, step_s, products))
    show(name, found)
    return found


def _of_family(name: str, row: Row) -> float:
    return float(row["families"].get(name, 0.0))


def show(name: str, found: Mapping[str, Any]) -> None:
    """Print what was found of one work."""
    rows: Sequence[Row] = found["steps"]
    lines = [f"\n{name}: {1e3 * found['step_s']:.2f} ms back to back"]
    for load in LOADS:
        group = [row for row in rows if row["load"] == load]
        if not group:
            continue
        busy = [1e3 * row["busy_s"] for row in group]
        spun = statistics.median(value for row in group for value in row["spin_mhz"])
        lines.append(
            f"  {load:22} {len(group):3} steps  {statistics.median(row['mhz'] for row in group):6.0f} MHz"
            f" ({min(row['least_mhz'] for row in group)}-{max(row['most_mhz'] for row in group)}, by spinning {spun:.0f},"
            f" capped {statistics.fmean(row['capped'] for row in group):4.0%})"
            f"  busy {statistics.median(busy):8.3f} ms ({min(busy):.3f}-{max(busy):.3f})"
        )
    whole, error = slope(rows, lambda row: row["busy_s"])
    lines.append(
        f"  follows the clock by {whole:.2f} ± {error:.2f}; beyond the law by {100 * worst_of_law(rows):+.2f} %"
    )
    total = sum(row["busy_s"] for row in rows)
    for each in sorted({one for row in rows for one in row["families"]}):
        share = sum(row["families"].get(each, 0.0) for row in rows) / total
        if share >= 0.01:
            part, error = slope(rows, partial(_of_family, each))
            lines.append(f"    {each:14} {share:5.1%} of busy time, follows by {part:5.2f} ± {error:.2f}")
    for row in found.get("gate", ()):
        clock = (
            "not sampled"
            if row["mhz"] is None
            else f"{row['mhz']:.0f} MHz, {row['readings']} readings, capped {row['capped']:.0%}"
        )
        lines.append(f"  gate, {'heated' if row['heated'] else 'cool  '}  busy {1e3 * row['busy_s']:.3f} ms  {clock}")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def _loaded(case_id: str) -> Any:
    """Return the warm program of a case."""
    case, device = catalogue()[case_id], torch.device("cuda", 0)
    program: Any = engine_of(case).load(case, device, build(case, device))
    for _ in range(max(3, getattr(program, "first_steps", 0) + 2)):
        program.step()
    torch.cuda.synchronize()
    return program


def main() -> None:
    """Measure a product, a copy, and each case while the time lasts; write all rows after each."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--limit", type=float, default=150.0, help="seconds in all")
    ask.add_argument("--case", action="append", help="a case's id; repeatable; by default four")
    asked = ask.parse_args()
    began = time.perf_counter()
    products = Products()
    found: dict[str, Any] = {"gpu": gpu_state(), "torch": torch.__version__, "works": {}}

    def keep(name: str, step: Step, *, gate: bool) -> None:
        try:
            found["works"][name] = measure(name, step, products, gate=gate)
        except Exception:  # the other works still count; the traceback is kept and printed
            found["works"][name] = {"failed": traceback.format_exc()}
            sys.stderr.write(found["works"][name]["failed"])
        found["gpu_after"] = gpu_state()
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    keep("product", repeated(products.step, 20), gate=False)
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    keep("copy", repeated(partial(target.copy_, source), 20), gate=False)
    del source, target  # an engine with a memory budget counts what is allocated
    torch.cuda.empty_cache()
    for case_id in asked.case or CASES:
        if time.perf_counter() - began > asked.limit - _STEP_NEEDS_S:
            sys.stdout.write(f"\n{case_id}: left out, {time.perf_counter() - began:.0f} s have passed\n")
            continue
        try:
            program = _loaded(case_id)
        except Exception:  # as above, for a case that cannot be built here
            found["works"][case_id] = {"failed": traceback.format_exc()}
            sys.stderr.write(found["works"][case_id]["failed"])
            continue
        if hasattr(program, "new_tokens"):
            program.new_tokens = _NEW_TOKENS
        keep(case_id, program.step, gate=True)
        program.close()
        del program
        gc.collect()
        torch.cuda.empty_cache()
    sys.stdout.write(f"\n{time.perf_counter() - began:.0f} s in all, rows in {asked.out}\n")


if __name__ == "__main__":
    main()
