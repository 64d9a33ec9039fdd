"""Two launchers, one per side: each runs its side's cases in fresh processes, forked from that side's own forkserver."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Literal, Self

from hpc_core.case.case import Case
from hpc_core.compare.ab import SideName
from hpc_core.compare.sides import Side
from hpc_core.launch.launcher import Launcher, preloadable
from hpc_core.record.job import Job, Measure, Retime, Way
from hpc_core.record.record import Failure, Record

Device = Literal["auto", "cpu", "cuda"]


class Bench:
    """A context manager that runs cases on two sides, and leaves no process behind.

    Both sides are launched the same way: if one cannot be warm, neither is.
    """

    def __init__(
        self, base: Side, head: Side, cases: Sequence[Case], *, way: Way = "warm", device: Device = "auto"
    ) -> None:
        self._device = device
        self._more = preloadable(cases) if way == "warm" else ()
        self._sides: dict[SideName, Side] = {"base": base, "head": head}
        self._launchers: dict[SideName, Launcher] = {
            name: self._launcher(side, way) for name, side in self._sides.items()
        }

    def _launcher(self, side: Side, way: Way) -> Launcher:
        return Launcher(way, python=side.python, environment=side.environment, folder=side.folder, preload=self._more)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for launcher in self._launchers.values():
            launcher.close()

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the numbers should know about how the workers were started."""
        return tuple(note for launcher in self._launchers.values() for note in launcher.notes)

    def prepare(self) -> None:
        """Start both forkservers at once. Takes as long as importing torch.

        Raises:
            LaunchError: an interpreter does not exist.
        """
        with ThreadPoolExecutor(len(self._launchers)) as pool:
            list(pool.map(Launcher.prepare, self._launchers.values()))
        if {launcher.way for launcher in self._launchers.values()} == {"warm", "exec"}:
            for name, side in self._sides.items():
                if self._launchers[name].way == "warm":
                    self._launchers[name].close()
                    self._launchers[name] = self._launcher(side, "exec")

    def replace_head(self, side: Side) -> None:
        """Run another head from now on, from a forkserver of its own."""
        self._sides["head"] = side
        self._launchers["head"].close()
        self._launchers["head"] = self._launcher(side, self._launchers["base"].way)

    def run(self, name: SideName, case: Case, again: bool = False) -> Record:
        """Run a case on a side and return its record; a failed one if it ran other code than the side's.

        Args:
            name: which side.
            case: what to run.
            again: measure times only, because the side has measured the case in full.

        Raises:
            LaunchError: no worker can be started at all.
            KeyboardInterrupt: after the worker has ended.
        """
        side = self._sides[name]
        kind = Retime() if again else Measure(profile=False)
        job = Job(case=case, kind=kind, device=self._device, fault=side.fault)
        record = self._launchers[name].run(job)
        commit = record.circumstances.commit
        if side.commit is None or commit == side.commit or record.status != "ok":
            return record
        message = f"{name} is {side.label}, but the worker ran {commit or 'no commit at all'}."
        failure = Failure(kind="refused", message=message, phase="record")
        return Record(case=case, status="failed", failure=failure, circumstances=record.circumstances)
