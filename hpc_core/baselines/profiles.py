"""The profile of a baseline, `<case>.profile.json.gz`: what the accepted record did, by module. For explanations, never for a verdict.

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
from hpc_core.record.files import read_regular
from hpc_core.record.plain import all_plain, fits, is_suspect, may_not_fit
from hpc_core.record.profile import Profile
from hpc_core.record.record import Metric, Record

_LARGEST_BYTES = 32 * 2**20
"""Unpacked. The profile of a 28-layer model takes a few hundred kB; a larger file was not written here."""


class StoredProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A profile, and which record it belongs to."""

    case: str
    digest: str
    exact: dict[str, float | int]
    """The record's gated bytes and counts, by metric: a profile explains the baseline that has the same ones. Without the counts of
    kernels where the profile holds no kernels."""
    measured_on: str = ""
    """The machine, where it is not the baseline's."""
    profile: Profile


def profile_path(root: Path, key: str, case_id: str) -> Path:
    """Return the path of a profile.

    Raises:
        BaselineError: as `baseline_path`.
    """
    return baseline_path(root, key, case_id).with_suffix(".profile.json.gz")


def profile_bytes(record: Record) -> bytes | None:
    """Return the content of the profile's file; None if the record has no profile."""
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
    """Return whether a metric counts kernels: the only exact one that differs between two GPU models of one chip."""
    return name.startswith("kernels")


def profile_to_keep(root: Path, record: Record, machine: str = "") -> tuple[Path, bytes]:
    """Return path and content of the file that adds this record's profile to an accepted baseline, which stays as it is.

    Args:
        root: folder of baselines.
        record: a sound one, with a profile.
        machine: key of the baseline's machine, where it is not the record's. If every byte and count agrees, memory and operators
            are the same; times of kernels are not, so another machine's kernels are left out.

    Raises:
        BaselineError: the record has no profile or is not sound, there is no sound baseline of its case, the two differ, or the
            baseline has a profile of its own that another machine's would replace.
    """
    own = record.circumstances.machine
    case, key, profile = record.case.id, machine or own.key, record.profile
    if record.status != "ok" or record.circumstances.fault is not None or profile is None:
        raise BaselineError(
            f"{case}: the record is {record.status} and has {'a' if profile else 'no'} profile; only a sound record with a profile can explain."
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
            f"{case}: {', '.join(other[:3])} of the record differ from the baseline's, so its profile would explain another baseline."
        )
    there = stored_profile(root, key, baseline)
    if lent and there is not None and not there.measured_on:
        raise BaselineError(
            f"{case}: the baseline in {root / key} has its own profile, which holds more than one of {own.name}."
        )
    return profile_path(root, key, case), _packed(record, profile, own.name if lent else "")


def _baseline_of(root: Path, key: str, record: Record, *, named: bool) -> Baseline:
    """Return the sound baseline of the record's case, of the same digest.

    Raises:
        BaselineError: there is none; the message lists the machines that have baselines, where one was named.
    """
    lookup = find(root, key, record.case.id)
    if isinstance(lookup, Baseline) and lookup.digest == record.case.digest:
        return lookup
    there = ", ".join(sorted(each.name for each in root.iterdir() if each.is_dir())) if root.is_dir() else ""
    advice = f"Machines here: {there or 'none'}" if named else "Accept the record: hpc-core baseline accept"
    raise BaselineError(
        f"{record.case.id}: there is no sound baseline with the digest of this case in {root / key}. {advice}."
    )


def stored_profile(root: Path, key: str, baseline: Baseline) -> StoredProfile | None:
    """Return the profile of a baseline, and the machine it was taken on; None where there is none.

    A file that cannot be read, or belongs to a record with other bytes or counts, is ignored: an explanation is then shorter.

    Raises:
        BaselineError: as `baseline_path`.
    """
    path = profile_path(root, key, baseline.case)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(read_regular(path, _LARGEST_BYTES))) as file:
            text = file.read(_LARGEST_BYTES + 1)
        stored = msgspec.json.decode(text, type=StoredProfile)
        if may_not_fit(text) and not fits(msgspec.to_builtins(stored)):
            return None
        if is_suspect(text):
            stored = msgspec.convert(all_plain(msgspec.to_builtins(stored)), StoredProfile)
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    mine = len(text) <= _LARGEST_BYTES and (stored.case, stored.digest) == (baseline.case, baseline.digest)
    return stored if mine and _is_of(stored, _exact(baseline.metrics)) else None


def _is_of(stored: StoredProfile, exact: Mapping[str, float | int]) -> bool:
    """Return whether these are the profile's bytes and counts. Only counts of kernels may be missing, where it holds no kernels."""
    known = {name for name in exact if stored.profile.kernels or not _counts_kernels(name)}
    return known <= stored.exact.keys() and stored.exact.items() <= exact.items()
