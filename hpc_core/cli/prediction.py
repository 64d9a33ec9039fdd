"""Predictions beside measurements: every baseline of a GPU that can be predicted, metric by metric, misses included."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.catalogue.predicted import PREDICTED
from hpc_core.launch.predictions import predicting_launcher, prediction, why_not
from hpc_core.record.gpus import GPUS
from hpc_core.record.record import Record

__all__ = ["Miss", "compare", "markdown", "predictions", "worst"]

_CATEGORY = "at_peak_"
_SMALL_BYTES = 2**20
"""Categories below this say nothing in percent: a few loose scalars."""


class Miss(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one case: what was predicted and what was measured."""

    case: str
    metric: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted != 0)


def predictions(cases: Iterable[Case], gpu: str, tell: Callable[[str], None]) -> list[Record]:
    """The predicted records of these cases, in order.

    Raises:
        SpecError: a case cannot be predicted.
    """
    records = []
    with predicting_launcher(several=True) as launcher:
        for case in cases:
            record = prediction(launcher, case, gpu=gpu)
            if record.failure is not None:
                raise SpecError(f"{case.id} cannot be predicted: {why_not(record)}")
            seconds = sum(record.circumstances.phase_s.values())
            tell(f"{case.id:<36} {record.metrics['peak_bytes'].value:>16,} bytes  {seconds:.1f} s")
            records.append(record)
    return records


def compare(records: Iterable[Record], baselines: Path, key: str) -> list[Miss]:
    """Each predicted metric that a baseline of the machine `key` has too."""
    misses = []
    for record in records:
        found = find(baselines, key, record.case.id)
        if not isinstance(found, Baseline) or found.digest != record.case.digest:
            continue
        for name, metric in record.metrics.items():
            if name in found.metrics and metric.gated and metric.unit == found.metrics[name].unit:
                pair = {"predicted": metric.value, "measured": found.metrics[name].value}
                misses.append(Miss(case=record.case.id, metric=name, **pair))
    return misses


def worst(misses: Iterable[Miss], kind: str) -> Miss | None:
    """The largest miss of one kind: "peak", "phase", "category", "kernels", "flops" or "operators"."""
    of_kind = [miss for miss in misses if _kind(miss) == kind]
    return max(of_kind, key=lambda miss: abs(miss.ratio), default=None)


def _kind(miss: Miss) -> str:
    name = miss.metric
    if name == "peak_bytes":
        return "peak"
    if name.startswith(_CATEGORY):
        return "category" if max(miss.predicted, miss.measured) >= _SMALL_BYTES else "small category"
    if name.startswith("peak_"):
        return "phase"
    for kind in ("kernels", "flops", "operators"):
        if name.startswith(kind):
            return kind
    return "other"


_COLUMNS = ("peak", "phase", "category", "flops", "operators", "kernels")


def markdown(misses: list[Miss]) -> str:
    """A table with a line a case: peak in bytes, and the largest miss of each kind in percent."""
    lines = [
        "| case | peak predicted | peak measured | peak | worst phase | worst category | FLOPs | operators | kernels |",
        "|---|---:|---:|---:|---|---|---:|---:|---:|",
    ]
    for case in dict.fromkeys(miss.case for miss in misses):
        mine = [miss for miss in misses if miss.case == case]
        peak = worst(mine, "peak")
        if peak is None:
            continue
        cells = [_cell(worst(mine, kind), named=kind in ("phase", "category")) for kind in _COLUMNS]
        lines.append(f"| `{case}` | {peak.predicted:,.0f} | {peak.measured:,.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(miss: Miss | None, *, named: bool) -> str:
    if miss is None:
        return "-"
    if miss.predicted == miss.measured:
        return "exact"
    name = f" {miss.metric.removeprefix(_CATEGORY).removeprefix('peak_').removesuffix('_bytes')}" if named else ""
    return f"{miss.ratio:+.4%}{name}" if abs(miss.ratio) < 1e-3 else f"{miss.ratio:+.2%}{name}"


def chosen(pattern: str, match: Callable[[str, str], bool]) -> list[Case]:
    """The predicted cases whose id matches.

    Raises:
        SpecError: none does.
    """
    found = [case for case in PREDICTED if match(case.id, pattern)]
    if not found:
        raise SpecError(f"No predicted case is called {pattern!r}. There are: {', '.join(c.id for c in PREDICTED)}.")
    return found


def machine_key(gpu: str) -> str:
    """The baselines' folder of a GPU, as `environment.machine` would name it."""
    memory = GPUS[gpu].memory_bytes
    return f"nvidia-{gpu.lower().replace(' ', '-')}-{round(memory / 2**30)}gib"
