"""From specification to module: causal language model, then quantization, then adapter. Knows nothing of measuring."""

from __future__ import annotations

from hpc_core.builders.assemble import Built, build

__all__ = ["Built", "build"]
