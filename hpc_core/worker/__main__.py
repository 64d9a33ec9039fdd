"""`python -m hpc_core.worker` serves one job."""

from __future__ import annotations

from hpc_core.worker.main import main

main()
