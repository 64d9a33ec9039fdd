"""Why a case moved: what is different in memory, operators, kernels, stack and case, ranked, in two lines and with details.

Reads a record and what is stored of the baseline; runs nothing and judges nothing.
"""

from __future__ import annotations

from hpc_core.explain.before import Before, before_of, stored_before
from hpc_core.explain.cause import Cause, explain, stored_cause

__all__ = ["Before", "Cause", "before_of", "explain", "stored_before", "stored_cause"]
