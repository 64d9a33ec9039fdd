"""What cannot be: closed forms of a case's least work and bytes, held against data sheets. Torch-free and pure.

`impossible(record)` names why a record cannot be, `ratio_impossible(a, b)` why two cannot both be, `suspicious(record)`
what is odd without being a proof.
"""

from __future__ import annotations

from hpc_core.bounds.check import impossible, judged, suspicious
from hpc_core.bounds.footprint import expected_bytes
from hpc_core.bounds.ratio import ratio_impossible

__all__ = [
    "expected_bytes",
    "impossible",
    "judged",
    "ratio_impossible",
    "suspicious",
]
