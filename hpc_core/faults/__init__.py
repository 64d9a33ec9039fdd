"""Injected faults: realistic ways to get slower, bigger or wrong, to see whether the gate catches them.

`pytest --benchmark --case ID --perf-fault NAME` runs a case with one; such a record never becomes a baseline.
"""

from __future__ import annotations

from hpc_core.faults.catalogue import FAULTS, Fault, Injection, inject

__all__ = ["FAULTS", "Fault", "Injection", "inject"]
