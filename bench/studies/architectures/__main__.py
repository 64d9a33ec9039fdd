"""Run and predict architectures: `python -m bench.studies.architectures [--only NAME] [--config DIR/config.json]`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.studies.architectures.table import Bench, config_cases, measured, page, read_rows, table_cases, write_rows
from hpc_core.case.errors import HpcCoreError
from hpc_core.catalogue.architectures import ARCHITECTURES

__all__: list[str] = []


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def main(arguments: list[str] | None = None) -> int:
    """Measure what is asked for, and store it. Return 1 if a row could not be made."""
    parser = argparse.ArgumentParser(prog="python -m bench.studies.architectures", description=__doc__)
    parser.add_argument("--only", action="append", choices=ARCHITECTURES, help="only this row; repeatable")
    parser.add_argument("--config", type=Path, help="print the row of this config.json instead")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="with --config")
    chosen = parser.parse_args(arguments)
    if chosen.config is not None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                cases = config_cases(chosen.config, Path(folder), attention=chosen.attention)
                with Bench(_tell) as bench:
                    row = measured(bench, *cases)
        except HpcCoreError as error:
            _tell(str(error))
            return 1
        sys.stdout.write(page([row]))
        return 0
    rows, broken = {row.name: row for row in read_rows()}, 0
    with Bench(_tell) as bench:
        for name in chosen.only or ARCHITECTURES:
            try:
                rows[name] = measured(bench, *table_cases(name))
            except HpcCoreError as error:
                _tell(str(error))
                rows.pop(name, None)
                broken = 1
            write_rows(rows.values())
    return broken


if __name__ == "__main__":
    sys.exit(main())
