"""Where a case lies under the roofline: the least work of a step, prefill or token over the time that it took.

Work and bytes are the closed forms of `bounds.cost`: what a step must at least compute and move. A point shows useful work, not
what the kernels did, so wasted work puts it further below the roof.
Source: Williams, Waterman, Patterson, "Roofline" (CACM 52, 2009).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import msgspec

from hpc_core.baselines.over_time import moment
from hpc_core.bounds.check import positions_of, step_seconds
from hpc_core.bounds.cost import Floor, decode_floor, prefill_floor, train_floor
from hpc_core.case.workloads import FinetuneSpec, GenerateSpec
from hpc_core.record.gpus import gpu_of
from hpc_core.record.record import Record
from hpc_core.report.entry import Entry

Work = Literal["step", "prefill", "decode"]
_MATMUL = ("matmul_", "_flop_per_s")


class RoofPoint(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of work of one case."""

    entry: Entry
    work: Work
    intensity: float
    """FLOP per byte, at least."""
    flop_per_s: float
    """Over GPU-busy time, or over wall time if only that was measured."""
    is_busy: bool


class Roof(msgspec.Struct, frozen=True, kw_only=True):
    """A bound: `flop_per_s` flat, and `bytes_per_s` the slope that leads up to it."""

    name: str
    flop_per_s: float
    bytes_per_s: float
    is_measured: bool
    """In the session of the records; otherwise from the data sheet."""


def points_of(entries: Iterable[Entry]) -> tuple[RoofPoint, ...]:
    """Return the points of all cases with a closed form and a time."""
    found = []
    for entry in entries:
        for work, floor, seconds, is_busy in _works(entry):
            if floor is None or not seconds or not floor.bytes or floor.flops <= 0:
                continue
            intensity, rate = floor.flops / floor.bytes, floor.flops / seconds
            if math.isfinite(intensity) and math.isfinite(rate) and min(intensity, rate) > 0:
                found.append(RoofPoint(entry=entry, work=work, intensity=intensity, flop_per_s=rate, is_busy=is_busy))
    return tuple(found)


def _works(entry: Entry) -> list[tuple[Work, Floor | None, float | None, bool]]:
    if entry.is_predicted or not entry.metrics:
        return []
    case, workload = entry.record.case, entry.record.case.workload
    if isinstance(workload, GenerateSpec):
        decode, prefill = (
            _busy_or_wall(entry, "busy_decode_token_s", "decode_token_s"),
            _busy_or_wall(entry, "busy_prefill_s", "time_to_first_token_s"),
        )
        return [("decode", decode_floor(case), *decode), ("prefill", prefill_floor(case), *prefill)]
    if isinstance(workload, FinetuneSpec):
        positions = positions_of(entry.record, workload)
        if positions is None:
            return []
        busy = step_seconds(entry.record, "busy_s", workload)
        seconds = busy if busy is not None else step_seconds(entry.record, "step_s", workload)
        return [("step", train_floor(case, positions), seconds, busy is not None)]
    return []


def _busy_or_wall(entry: Entry, busy: str, wall: str) -> tuple[float | None, bool]:
    return entry.value(busy, wall), busy in entry.metrics


def roofs_of(record: Record) -> tuple[Roof, ...]:
    """Return the ceilings measured in a record's session, highest first, then that of its card's data sheet."""
    measured = record.circumstances.ceilings
    bandwidth = measured.get("copy_bytes_per_s", 0.0)
    roofs = [
        Roof(name=f"{_dtype(name)}, measured", flop_per_s=rate, bytes_per_s=bandwidth, is_measured=True)
        for name, rate in sorted(measured.items(), key=lambda each: -each[1])
        if name.startswith(_MATMUL[0]) and name.endswith(_MATMUL[1]) and _sound(rate) and _sound(bandwidth)
    ]
    sheet = gpu_of(record.circumstances.machine)
    if sheet is not None:
        top = sheet.flop_per_s["bfloat16"]
        roofs.append(
            Roof(name="bfloat16, data sheet", flop_per_s=top, bytes_per_s=sheet.bytes_per_s, is_measured=False)
        )
    return tuple(roofs)


def newest_roofs(entries: Iterable[Entry]) -> tuple[Roof, ...]:
    """Return the roofs of the newest session that has any."""
    by_age = sorted((entry.record for entry in entries), key=lambda record: moment(record.circumstances.started_at))
    return next((roofs for record in reversed(by_age) if (roofs := roofs_of(record))), ())


def _dtype(name: str) -> str:
    return name.removeprefix(_MATMUL[0]).removesuffix(_MATMUL[1])


def _sound(rate: float) -> bool:
    return math.isfinite(rate) and rate > 0
