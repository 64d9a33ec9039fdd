"""The profile beside a baseline, `<case>.profile.json.gz`: what the accepted record did, by module. For explanations, never for a verdict.

The same record gives the same bytes, so that accepting it again changes no file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from hpc_core.baselines.baseline import Baseline, gated_metrics
from hpc_core.baselines.lookup import baseline_path, find
from hpc_core.case.errors import BaselineError
from hpc_core.record.profile import Profile
from hpc_core.record.record import Metric, Record

__all__ = [
    "StoredProfile",
    "profile_bytes",
    "profile_path",
    "profile_to_keep",
    "stored_profile",
]

_LARGEST_BYTES = 32 * 2**20
"""Unpacked; one of a 28-layer model takes some hundred kB. What unpacks to more was not written here."""


class StoredProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile, and which record it is of."""

    case: str
    digest: str
    exact: dict[str, float | int]
    """The record's gated bytes and counts, by metric: a profile explains the baseline that has the same. Without kernels' counts where the
    profile holds no kernels."""
    measured_on: str = ""
    """The machine, where the baseline is another one's."""
    profile: Profile


def profile_path(root: Path, key: str, case_id: str) -> Path:
    """Where it lies.

    Raises:
        BaselineError: as `baseline_path`.
    """
    return baseline_path(root, key, case_id).with_suffix(".profile.json.gz")


def profile_bytes(record: Record) -> bytes | None:
    """The file of this record's profile; None if it has none."""
    return None if record.profile is None else _packed(record, record.profile, "")


def _packed(record: Record, profile: Profile, measured_on: str) -> bytes:
    exact = _exact(gated_metrics(record))
    stored = StoredProfile(
        case=record.case.id,
        digest=record.case.digest,
        exact={name: value for name, value in exact.items() if profile.kernels or not _counts_kernels(name)},
        measured_on=measured_on,
        profile=profile,
    )
    return gzip.compress(msgspec.json.encode(stored, order="sorted"), mtime=0)


def _exact(metrics: Mapping[str, Metric]) -> dict[str, float | int]:
    return {name: metric.value for name, metric in metrics.items() if metric.noise == "exact"}


def _counts_kernels(name: str) -> bool:
    """Which kernels run is the one thing exact in which two GPU models of one chip were seen to differ: libraries choose by the device."""
    return name.startswith("kernels")


def profile_to_keep(root: Path, record: Record, machine: str = "") -> tuple[Path, bytes]:
    """The file that lays this record's profile beside the baseline that is there, which stays as it is: where, and what is in it.

    Args:
        root: folder of baselines.
        record: a sound one, with a profile.
        machine: key of the baseline's machine, where it is not the record's. Its memory and operators are the same if every byte and count is; how
            long kernels take is not, so of another machine's profile they are left out.

    Raises:
        BaselineError: the record has no profile or is not sound, there is no sound baseline of its case, the two differ, or the baseline
            has a profile of its own that another machine's would replace.
    """
    own = record.circumstances.machine
    case, key, profile = record.case.id, machine or own.key, record.profile
    if record.status != "ok" or record.circumstances.fault is not None or profile is None:
        raise BaselineError(
            f"{case}: the record is {record.status} and has {'a' if profile else 'no'} profile; only a sound one with a profile can explain."
        )
    baseline = _baseline_of(root, key, record, named=bool(machine))
    was, now = _exact(baseline.metrics), _exact(gated_metrics(record))
    other = sorted(name for name in {*was, *now} if was.get(name) != now.get(name))
    lent = key != own.key
    if lent:
        profile = msgspec.structs.replace(profile, kernels=())
        other = [name for name in other if not _counts_kernels(name)]
    if other:
        raise BaselineError(
            f"{case}: {', '.join(other[:3])} of the record are not the baseline's, so its profile would explain another one."
        )
    there = stored_profile(root, key, baseline)
    if lent and there is not None and not there.measured_on:
        raise BaselineError(
            f"{case}: the baseline in {root / key} has its own profile, and one of {own.name} knows less."
        )
    return profile_path(root, key, case), _packed(record, profile, own.name if lent else "")


def _baseline_of(root: Path, key: str, record: Record, *, named: bool) -> Baseline:
    """The sound baseline of the record's very case.

    Raises:
        BaselineError: there is none; with the machines that there are, where one was named.
    """
    lookup = find(root, key, record.case.id)
    if isinstance(lookup, Baseline) and lookup.digest == record.case.digest:
        return lookup
    there = ", ".join(sorted(each.name for each in root.iterdir() if each.is_dir())) if root.is_dir() else ""
    advice = f"Machines here: {there or 'none'}" if named else "Accept the record: hpc-core baseline accept"
    raise BaselineError(f"{record.case.id}: there is no sound baseline of this very case in {root / key}. {advice}.")


def stored_profile(root: Path, key: str, baseline: Baseline) -> StoredProfile | None:
    """The profile of a baseline, and whose it is; None where there is none of it.

    A file that cannot be read, or is of a record with other bytes or counts, counts as none: an explanation is then shorter.

    Raises:
        BaselineError: as `baseline_path`.
    """
    path = profile_path(root, key, baseline.case)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(path.read_bytes())) as file:
            text = file.read(_LARGEST_BYTES + 1)
        stored = msgspec.json.decode(text, type=StoredProfile)
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    mine = len(text) <= _LARGEST_BYTES and (stored.case, stored.digest) == (baseline.case, baseline.digest)
    return stored if mine and _is_of(stored, _exact(baseline.metrics)) else None


def _is_of(stored: StoredProfile, exact: Mapping[str, float | int]) -> bool:
    """Whether these are the profile's bytes and counts. Kernels' counts may be missing from one that holds no kernels, and nothing else."""
    known = {name for name in exact if stored.profile.kernels or not _counts_kernels(name)}
    return known <= stored.exact.keys() and stored.exact.items() <= exact.items()
