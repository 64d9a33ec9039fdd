"""The profile beside a baseline, `<case>.profile.json.gz`: what the accepted record did, by module. For explanations, never for a verdict.

The same record gives the same bytes, so that accepting it again changes no file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path

import msgspec

from hpc_core.profile import Profile
from hpc_core.record import Record
from hpc_core.store.lookup import baseline_path

__all__ = ["StoredProfile", "last_profile", "profile_bytes", "profile_path"]

_LARGEST_BYTES = 32 * 2**20
"""Unpacked; one of a 28-layer model takes some hundred kB. What unpacks to more was not written here."""


class StoredProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A profile, and which record it is of."""

    case: str
    digest: str
    started_at: str
    profile: Profile


def profile_path(root: Path, key: str, case_id: str) -> Path:
    """Where it lies.

    Raises:
        BaselineError: as `baseline_path`.
    """
    return baseline_path(root, key, case_id).with_suffix(".profile.json.gz")


def profile_bytes(record: Record) -> bytes | None:
    """The file of this record's profile; None if it has none."""
    if record.profile is None:
        return None
    stored = StoredProfile(
        case=record.case.id,
        digest=record.case.digest,
        started_at=record.circumstances.started_at,
        profile=record.profile,
    )
    return gzip.compress(msgspec.json.encode(stored, order="sorted"), mtime=0)


def last_profile(root: Path, key: str, case_id: str, *, digest: str, started_at: str) -> Profile | None:
    """The profile of the record that was accepted last, which began at `started_at`; None where there is none of it.

    A file that cannot be read, is of another case or another acceptance, counts as none: an explanation is then shorter.

    Raises:
        BaselineError: as `baseline_path`.
    """
    path = profile_path(root, key, case_id)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(path.read_bytes())) as file:
            text = file.read(_LARGEST_BYTES + 1)
        stored = msgspec.json.decode(text, type=StoredProfile)
    except (OSError, EOFError, zlib.error, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    mine = len(text) <= _LARGEST_BYTES and (stored.case, stored.digest) == (case_id, digest)
    return stored.profile if mine and stored.started_at == started_at else None
