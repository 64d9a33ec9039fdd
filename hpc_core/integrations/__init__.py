"""Records of runs that hpc-core does not start: a callback for transformers' Trainer, and so for TRL's trainers.

Knows the libraries whose events it hears. Judges nothing: the records are judged, accepted and shown like any other.
"""

from __future__ import annotations

from hpc_core.integrations.trainer import PerfCallback

__all__ = ["PerfCallback"]
