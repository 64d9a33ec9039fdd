"""torch's profiler over one piece of work, without the warning that is about schedules."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["one_cycle"]


def one_cycle(activities: Sequence[torch.profiler.ProfilerActivity], **options: Any) -> torch.profiler.profile:
    """A profiler that records from its start to its stop; `options` are torch.profiler.profile's.

    Without acc_events torch (2.11) warns that it keeps one cycle only, which is all there is; with it, it builds its event tree, and ten steps of
    five thousand kernels take seven seconds more.
    """
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events")
    return torch.profiler.profile(activities=activities, **options)
