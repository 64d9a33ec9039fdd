"""`python -m hpc_core.worker` serves one job; with `--describe` it says what its workers would run."""

from __future__ import annotations

import sys

from hpc_core.worker import describe, main

if sys.argv[1:] == ["--describe"]:
    describe.main()
else:
    main.main()
