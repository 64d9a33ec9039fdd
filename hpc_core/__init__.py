"""hpc-core: a performance-regression suite for LLM generation and fine-tuning.

The names here are public; everything else may change. Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hpc_core.record.version import __version__

if TYPE_CHECKING:
    from hpc_core.case.case import Case
    from hpc_core.case.limits import GiB, Limits, MiB
    from hpc_core.case.parts import AdapterSpec, DataSpec, ModelSpec, QuantSpec
    from hpc_core.case.workloads import CallableSpec, FinetuneSpec, GenerateSpec
    from hpc_core.launch.predictions import predicted
    from hpc_core.plugin.cases import perf_cases, predicted_cases
    from hpc_core.record.record import Metric, Record

_HOMES = {
    "hpc_core.case.case": ("Case",),
    "hpc_core.case.limits": ("GiB", "Limits", "MiB"),
    "hpc_core.case.parts": ("AdapterSpec", "DataSpec", "ModelSpec", "QuantSpec"),
    "hpc_core.case.workloads": ("CallableSpec", "FinetuneSpec", "GenerateSpec"),
    "hpc_core.plugin.cases": ("perf_cases", "predicted_cases"),
    "hpc_core.launch.predictions": ("predicted",),
    "hpc_core.record.record": ("Metric", "Record"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterSpec",
    "CallableSpec",
    "Case",
    "DataSpec",
    "FinetuneSpec",
    "GenerateSpec",
    "GiB",
    "Limits",
    "Metric",
    "MiB",
    "ModelSpec",
    "QuantSpec",
    "Record",
    "__version__",
    "perf_cases",
    "predicted",
    "predicted_cases",
]


def __getattr__(name: str) -> Any:
    """Public names are loaded on first use, so that `import hpc_core` costs milliseconds."""
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'hpc_core' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
