"""What torch.compile did in this process: graph breaks and recompilations, with the guard that failed and the function that it guards."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch

from hpc_core.instruments.counters import compiled_graphs
from hpc_core.record.findings import Findings
from hpc_core.record.metrics import metric

_MOST_REASONS = 2
_LONGEST = 160
"""Characters of a guard that are shown."""


@dataclass(frozen=True)
class Compilations:
    """What torch.compile had done at one moment; by default, when the process began."""

    breaks: int = 0
    graphs: int = 0
    made: tuple[Any, ...] = ()
    """The compilations that dynamo remembers, its last 64. Kept alive, so that no later one is taken for one of these."""

    @classmethod
    def now(cls) -> Compilations:
        """Return what torch.compile has done so far."""
        return cls(_breaks(), compiled_graphs(), _made())

    def findings(self, device: torch.device, *, gated: bool | None = None) -> Findings:
        """Return `graph_breaks` and `recompilations` since then; the note of the latter names guards and functions.

        They are gated on a GPU and shown on a CPU, unless `gated` says whether recompilations are judged.
        """
        earlier, on_gpu = {id(each) for each in self.made}, device.type == "cuda"
        again = [each for each in _made() if id(each) not in earlier and each.recompile_reason is not None]
        graphs = compiled_graphs() - self.graphs
        note = f"torch.compile made {graphs} graphs; operators, FLOPs and the profile are those of the same functions run eagerly"
        return Findings(
            metrics={
                "graph_breaks": metric("graph_breaks", max(_breaks() - self.breaks, 0), on_gpu=on_gpu),
                "recompilations": metric(
                    "recompilations", len(again), on_gpu=on_gpu, gated=gated, note=_reasons(again) or None
                ),
            },
            notes=(note,) if graphs else (),
        )


def _dynamo() -> Any:
    """Return dynamo's counters; None where nothing has imported them: importing dynamo takes a second."""
    return sys.modules.get("torch._dynamo.utils")


def _made() -> tuple[Any, ...]:
    dynamo = _dynamo()
    return () if dynamo is None else tuple(dynamo.get_compilation_metrics())


def _breaks() -> int:
    dynamo = _dynamo()
    return 0 if dynamo is None else int(sum(dynamo.counters["graph_break"].values()))


def _reasons(again: Iterable[Any]) -> str:
    """Return each function, its place, and the first guard that failed: "forward (FILE:LINE): tensor 'x' size mismatch at index 0"."""
    first: dict[str, str] = {}
    for each in again:
        if each.co_name is None:  # torch.compile reached its limit and gave the function up
            continue
        where = f"{each.co_name} ({PurePath(each.co_filename or '?').name}:{each.co_firstlineno})"
        guard = str(each.recompile_reason).partition(": ")[2].splitlines() or [str(each.recompile_reason)]
        first.setdefault(where, guard[0][:_LONGEST])
    shown = [f"{where}: {guard}" for where, guard in list(first.items())[:_MOST_REASONS]]
    more = [f"and {len(first) - _MOST_REASONS} functions more"] if len(first) > _MOST_REASONS else []
    return "; ".join([*shown, *more])
