"""Sample where the host spends its time, waiting included: what counts of bytecodes and calls cannot see.

A thread looks at the calling thread once a millisecond. Its frames tell the line, whether it computes, sleeps or waits for a lock.
"""

from __future__ import annotations

import sys
import sysconfig
import threading
import time
from collections import Counter
from types import FrameType

import torch

from hpc_core.instruments.clock import seconds_of
from hpc_core.instruments.host import file_of
from hpc_core.instruments.program import Program
from hpc_core.record.findings import Findings
from hpc_core.record.profile import HostTime

_EVERY_S = 0.001
_LEAST_S = 0.3
"""Seconds of work that are sampled at least."""
_LEAST_SHARE = 0.01
_STDLIB = sysconfig.get_paths()["stdlib"]


def host_times(program: Program, device: torch.device) -> Findings:
    """Run steps for at least 0.3 s, and return the seconds that one spends in each line, the longest first.

    Time in the standard library counts for the line that calls it: where a lock is asked for, not where `threading` waits.
    """
    seen, done, watched = Counter[tuple[str, str, int]](), threading.Event(), threading.get_ident()

    def look() -> None:
        while not done.wait(_EVERY_S):
            frame = sys._current_frames().get(watched)
            if frame is not None and (place := _place(frame)) is not None:
                seen[place] += 1

    sampler = threading.Thread(target=look, name="hpc-core samples the host", daemon=True)
    runs, began = 0, time.perf_counter()
    sampler.start()
    try:
        while (took := time.perf_counter() - began) < _LEAST_S:
            seconds_of(program.step, device)
            runs += 1
    finally:
        done.set()
        sampler.join()
    total = seen.total()
    rows = (
        HostTime(file_of(file), function, line, round(took / runs * count / total, 6))
        for (file, function, line), count in seen.most_common()
        if count >= _LEAST_SHARE * total
    )
    return Findings(host_times=tuple(rows))


def _place(frame: FrameType) -> tuple[str, str, int] | None:
    """Return file, function and line of the innermost frame that is not the standard library's."""
    at: FrameType | None = frame
    while at is not None and _is_stdlib(at.f_code.co_filename):
        at = at.f_back
    return None if at is None else (at.f_code.co_filename, at.f_code.co_qualname, at.f_lineno or 0)


def _is_stdlib(file: str) -> bool:
    return file.startswith((_STDLIB, "<frozen ")) and "site-packages" not in file
