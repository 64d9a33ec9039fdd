"""How fast this machine is, for tests whose goals were set on another: seconds are divided by its slowness, hours are not waited for."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["emulates_bfloat16", "slowness"]

_USUAL_S = 0.065
"""Of a million rounds of `slowness`, on the two-core machine where the goals were set."""


def slowness() -> float:
    """How many times longer plain Python takes here than on the core that the goals were set on; at least once.

    Another program on the same core, or an older core, stretches both alike.
    """
    began = time.process_time()
    sum(index * index % 7 for index in range(1_000_000))
    return max(1.0, (time.process_time() - began) / _USUAL_S)


def emulates_bfloat16() -> bool:
    """Whether products in bfloat16 take minutes here: oneDNN has them for AVX-512 and later, torch's own loops take over elsewhere on x86."""
    told = Path("/proc/cpuinfo").read_text()
    return "avx2" in told and "avx512f" not in told
