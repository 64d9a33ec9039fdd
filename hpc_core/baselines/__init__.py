"""Baselines on disk: one readable file a case and machine, with the accepted records beside it as its proof.

`find` looks one up and never raises for what a file holds; `accept` writes one, `unstored` makes one that is not kept.
`sessions` are the accepted ones, for statistics; `PastBaselines` are those of a commit. Does not judge: `gate` does.
"""

from __future__ import annotations

from hpc_core.baselines.acceptance import accept, unstored
from hpc_core.baselines.at_commit import BaselineChange, PastBaselines, baseline_changes
from hpc_core.baselines.baseline import (
    Acceptance,
    Accepted,
    Baseline,
    Change,
    Damaged,
    Lookup,
    Missing,
    OlderSchema,
    gated_metrics,
    proves_nothing,
)
from hpc_core.baselines.history_file import HISTORY_BYTES, HISTORY_LENGTH, last_accepted
from hpc_core.baselines.lookup import baseline_path, find, history_path
from hpc_core.baselines.profile_file import profile_path, profile_to_keep, stored_profile
from hpc_core.baselines.sessions import (
    Session,
    accepted_records,
    session_of,
    sessions,
)

__all__ = [
    "HISTORY_BYTES",
    "HISTORY_LENGTH",
    "Acceptance",
    "Accepted",
    "Baseline",
    "BaselineChange",
    "Change",
    "Damaged",
    "Lookup",
    "Missing",
    "OlderSchema",
    "PastBaselines",
    "Session",
    "accept",
    "accepted_records",
    "baseline_changes",
    "baseline_path",
    "find",
    "gated_metrics",
    "history_path",
    "last_accepted",
    "profile_path",
    "profile_to_keep",
    "proves_nothing",
    "session_of",
    "sessions",
    "stored_profile",
    "unstored",
]
