"""What this machine's CPU lacks, for tests that would take minutes on it."""

from __future__ import annotations

from pathlib import Path


def emulates_bfloat16() -> bool:
    """Return whether products in bfloat16 are slow here. oneDNN has them for AVX-512 and later; elsewhere on x86 torch uses loops of its own."""
    cpu_flags = Path("/proc/cpuinfo").read_text()
    return "avx2" in cpu_flags and "avx512f" not in cpu_flags
