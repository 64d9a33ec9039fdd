"""Baselines on disk: one readable file a case and machine, with the accepted records beside it as its proof.

`find` looks one up and never raises for what a file holds; `accept` writes one, `unstored` makes one that is not kept. Does
not judge: `gate` does.
"""

from __future__ import annotations

from hpc_core.store.acceptance import HISTORY_LENGTH, accept, last_accepted, unstored
from hpc_core.store.baseline import (
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
from hpc_core.store.lookup import baseline_path, find, history_path

__all__ = [
    "HISTORY_LENGTH",
    "Acceptance",
    "Accepted",
    "Baseline",
    "Change",
    "Damaged",
    "Lookup",
    "Missing",
    "OlderSchema",
    "accept",
    "baseline_path",
    "find",
    "gated_metrics",
    "history_path",
    "last_accepted",
    "proves_nothing",
    "unstored",
]
