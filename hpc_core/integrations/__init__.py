"""Records of trainings that hpc-core does not start: a callback for transformers' Trainer, and so for TRL's trainers.

The records are judged, accepted and shown like any other.
"""

from __future__ import annotations

from hpc_core.integrations.trainer import PerfCallback

__all__ = ["PerfCallback"]
