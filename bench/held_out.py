"""Cases that were predicted before they were measured: `pytest --benchmark --cases bench/held_out.py --case GLOB` on a GPU."""

from __future__ import annotations

from hpc_core.catalogue.predicted import HELD_OUT as CASES

__all__ = ["CASES"]
