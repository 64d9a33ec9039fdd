"""Read what a record is compared with: the baseline's numbers, and what is stored next to them for explanations."""

from __future__ import annotations

from pathlib import Path

import msgspec

from hpc_core.baselines.baseline import Baseline, Lookup
from hpc_core.baselines.history import last_accepted
from hpc_core.baselines.profiles import stored_profile
from hpc_core.case.case import Case
from hpc_core.record.profile import Profile
from hpc_core.record.record import Metric, Record


class Before(msgspec.Struct, frozen=True, kw_only=True):
    """The earlier side of an explanation."""

    case: Case
    stack: dict[str, str]
    settings: dict[str, str] | None = None
    python: str
    commit: str | None
    metrics: dict[str, Metric]
    """The accepted values; and those that are shown and not gated, of the record that was accepted last."""
    record: Record | None = None
    profile: Profile | None = None
    profile_of: str = ""
    """The machine that the profile was taken on, where it is not the baseline's; the profile then holds no kernels."""


def before_of(record: Record) -> Before:
    """Return a record as the earlier side, with its own profile."""
    return Before(
        case=record.case,
        stack=record.circumstances.stack,
        settings=record.circumstances.settings,
        python=record.circumstances.python,
        commit=record.circumstances.commit,
        metrics=record.metrics,
        record=record,
        profile=record.profile,
    )


def stored_before(root: Path, key: str, lookup: Lookup) -> Before | None:
    """Return what is stored of a baseline; None where there is no sound one.

    Raises:
        BaselineError: as `baseline_path`.
    """
    if not isinstance(lookup, Baseline):
        return None
    record = last_accepted(root, key, lookup.case)
    if record is not None and record.case.digest != lookup.digest:
        record = None
    stored = stored_profile(root, key, lookup)
    return Before(
        case=lookup.spec,
        stack=lookup.stack,
        settings=lookup.settings,
        python=lookup.python,
        commit=lookup.accepted.commit,
        metrics=({} if record is None else record.metrics) | lookup.metrics,
        record=record,
        profile=None if stored is None else stored.profile,
        profile_of="" if stored is None else stored.measured_on,
    )
