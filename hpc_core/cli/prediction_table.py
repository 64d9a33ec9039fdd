"""`hpc-core prediction-table`: predict every case that has a baseline of a GPU, and compare metric by metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hpc_core.baselines.baseline import Baseline
from hpc_core.baselines.lookup import find
from hpc_core.case.case import Case
from hpc_core.case.errors import SpecError
from hpc_core.catalogue.predicted import PREDICTED
from hpc_core.cli.console import say, say_json, tell
from hpc_core.launch.predictions import predicting_launcher, prediction, why_not
from hpc_core.record.gpus import DEFAULT, GPUS, gpu_named
from hpc_core.record.record import Record

_CATEGORY = "at_peak_"
_SMALL_BYTES = 2**20
"""Smaller categories are a few scalars, for which a percentage means nothing."""


class Miss(msgspec.Struct, frozen=True, kw_only=True):
    """One metric of one case: what was predicted and what was measured."""

    case: str
    metric: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured, minus one."""
        return self.predicted / self.measured - 1 if self.measured else float(self.predicted != 0)


def predictions(cases: Iterable[Case], gpu: str, tell: Callable[[str], None]) -> list[Record]:
    """Predict these cases, in order.

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
    """Return each predicted metric that a baseline of the machine `key` also has."""
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
    """Return the largest miss of one kind: "peak", "phase", "category", "kernels", "flops" or "operators"."""
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
    """Return a Markdown table with one row per case: peak in bytes, and the largest miss of each kind in percent."""
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


def _chosen(glob: str) -> list[Case]:
    """Return the predicted cases whose id matches.

    Raises:
        SpecError: none does.
    """
    found = [case for case in PREDICTED if fnmatchcase(case.id, glob)]
    if not found:
        raise SpecError(f"No predicted case is called {glob!r}. There are: {', '.join(c.id for c in PREDICTED)}.")
    return found


def machine_key(gpu: str) -> str:
    """Return the name of a GPU's folder of baselines, as `environment.machine` derives it."""
    memory = GPUS[gpu].memory_bytes
    return f"nvidia-{gpu.lower().replace(' ', '-')}-{round(memory / 2**30)}gib"


def prediction_table(
    only: Annotated[str, typer.Option(help="Only these cases: a glob over full ids.")] = "*",
    gpu: Annotated[str, typer.Option(help="The GPU whose baselines are compared.")] = DEFAULT,
    baselines: Annotated[Path, typer.Option(help="The folder of baselines.")] = Path("baselines"),
    as_json: Annotated[bool, typer.Option("--json", help="Print every number as JSON.")] = False,
) -> None:
    """Predict every case that was measured on a GPU, and print both numbers."""
    name = gpu_named(gpu).name
    key = machine_key(name)
    cases = [case for case in _chosen(only) if isinstance(find(baselines, key, case.id), Baseline)]
    if not cases:
        raise SpecError(f"{baselines / key} holds no baseline of a case that matches {only!r}.")
    misses = compare(predictions(cases, name, tell), baselines, key)
    if as_json:
        say_json(misses)
    else:
        say(markdown(misses))
