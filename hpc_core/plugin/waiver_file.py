"""The file of waivers: where it lies, and what is wrong with it in one line. What a waiver does is the gate's."""

from __future__ import annotations

import pytest

from hpc_core.case.errors import SpecError
from hpc_core.gate.waivers import Waiver, waivers_from_toml

__all__ = ["WAIVERS", "read_waivers"]

WAIVERS = "perf-waivers.toml"
"""Its name below the root folder, unless the ini file says another."""


def read_waivers(config: pytest.Config) -> tuple[Waiver, ...]:
    """The entries of the file; none where there is no file and the ini file names none.

    Raises:
        pytest.UsageError: a file that is named and not there, or that cannot be read as waivers.
    """
    name = str(config.getini("perf_waivers"))
    path = config.rootpath / name
    if not path.exists():
        if name != WAIVERS:
            raise pytest.UsageError(f"perf_waivers: there is no file {path}.")
        return ()
    try:
        return waivers_from_toml(path.read_text(encoding="utf-8"), name)
    except SpecError as error:
        raise pytest.UsageError(str(error)) from error
    except (OSError, UnicodeDecodeError) as error:
        raise pytest.UsageError(f"{name} cannot be read: {error}") from error
