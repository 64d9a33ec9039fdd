"""The faults by name: which variant each is tried on, and what it must turn red.

Knows no torch: a fault's patch lies in a module beside this package and is imported when the fault is injected.
"""

from __future__ import annotations

from hpc_core.faults.catalogue.built import BUILT
from hpc_core.faults.catalogue.generated import GENERATED
from hpc_core.faults.catalogue.trained import TRAINED
from hpc_core.faults.fault import Fault

__all__ = ["FAULTS"]

FAULTS: dict[str, Fault] = {fault.name: fault for fault in (*BUILT, *TRAINED, *GENERATED)}
"""The catalogue."""
