"""`python -m hpc_core.cli`."""

from __future__ import annotations

from hpc_core.cli import main

if __name__ == "__main__":
    main()
