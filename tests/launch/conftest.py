"""One forkserver for all tests of launching."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from hpc_core.case.case import Case
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Event

Listener = Callable[[Case, Event], None]


class Listening:
    """A launcher whose events go to the current listener."""

    def __init__(self) -> None:
        self.listener: Listener | None = None
        self.launcher = Launcher("warm", on_event=self._heard)

    def _heard(self, case: Case, event: Event) -> None:
        if self.listener is not None:
            self.listener(case, event)


@pytest.fixture(scope="session")
def listening() -> Iterator[Listening]:
    """The launcher, with its forkserver started."""
    shared = Listening()
    with shared.launcher as launcher:
        launcher.prepare()
        assert launcher.way == "warm", launcher.notes
        yield shared


@pytest.fixture
def warm(listening: Listening) -> Iterator[Launcher]:
    """The launcher. The test's listener is removed afterwards."""
    yield listening.launcher
    listening.listener = None
