"""Injected faults: realistic ways to get slower, bigger or wrong, to see whether the gate catches them.

`pytest --benchmark --case ID --perf-fault NAME` runs a case with one; such a record never becomes a baseline.
"""

from __future__ import annotations

from hpc_core.faults.catalogue import FAULTS
from hpc_core.faults.fault import TWIN, Fault, Injection
from hpc_core.faults.injecting import in_place, inject

__all__ = ["FAULTS", "TWIN", "Fault", "Injection", "in_place", "inject"]
