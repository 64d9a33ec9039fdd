"""What this machine has, what is missing or broken, and what to do about it.

Whatever may be broken is only touched in child processes with a time limit: a library that crashes, hangs or prints costs one line.
"""

from __future__ import annotations

from hpc_core.doctor.checks import Check, State
from hpc_core.doctor.examination import Examination, examine

__all__ = ["Check", "Examination", "State", "examine"]
