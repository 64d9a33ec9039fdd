"""Drawing several pictures at once: which there are, and worker processes that draw them while the caller goes on."""

from __future__ import annotations

import gc
import importlib.util
import io
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from hpc_core.case.errors import LaunchError, MissingLibraryError, SpecError
from hpc_core.report.entry import Entry
from hpc_core.report.plots.ablation import draw_ablation
from hpc_core.report.plots.bars import draw_finetune, draw_latency, draw_memory, draw_throughput
from hpc_core.report.plots.categories import draw_categories
from hpc_core.report.plots.points import draw_roofline, draw_speed_memory
from hpc_core.report.plots.style import DOTS_PER_INCH, rc, settle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PLOTS", "Drawing"]

PLOTS: dict[str, Callable[[Figure, Sequence[Entry]], bool]] = {
    "inference-memory": draw_memory,
    "inference-latency": draw_latency,
    "inference-throughput": draw_throughput,
    "finetune": draw_finetune,
    "speed-memory": draw_speed_memory,
    "roofline": draw_roofline,
    "memory-categories": draw_categories,
    "ablation": draw_ablation,
}
"""By file name. Each fills a figure, or says False where the entries hold nothing for it."""


class _Task(NamedTuple):
    """One picture."""

    name: str
    """Of its file, without the ending."""
    plot: str
    entries: Sequence[Entry]


class Drawing:
    """A context manager: entered, its worker processes draw; `contents` waits for them. With one process `contents` draws itself.

    Args:
        entries: what is shown; each machine's by themselves.
        folder: where the pictures shall lie, `<folder>/<plot>.<kind>` or, for several machines, `<folder>/<machine>-<plot>.<kind>`.
        kinds: "svg" and "png".
        processes: worker processes, forked.
        begin: called first in each of them.

    Raises:
        MissingLibraryError: matplotlib is not installed.
        SpecError: the folder is a file.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        folder: Path,
        kinds: Sequence[str],
        *,
        processes: int = 1,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise MissingLibraryError("Drawing needs matplotlib: pip install 'hpc-core[plots]'.")
        if folder.exists() and not folder.is_dir():
            raise SpecError(f"{folder}: pictures go into a folder, and this is a file.")
        self._cases = len(entries)
        self._folder = folder
        self._kinds = tuple(kinds)
        self._tasks = _tasks(entries)
        self._processes = min(processes, len(self._tasks))
        self._begin = begin
        self._pool: ProcessPoolExecutor | None = None
        self._begun: list[Future[dict[str, bytes]]] = []

    def __enter__(self) -> Self:
        if self._processes > 1:
            # Forked, entries need no copy. No thread of ours is there, and those of BLAS are made for it.
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(
                self._processes, context, initializer=_take, initargs=(self._tasks, self._kinds, self._begin)
            )
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
                # The later ones take longest.
                begun = [self._pool.submit(_draw_taken, number) for number in reversed(range(len(self._tasks)))]
            self._begun = begun[::-1]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def contents(self) -> dict[Path, bytes]:
        """Every picture, by the path that it shall have.

        Raises:
            LaunchError: a process that drew is gone.
            SpecError: nothing of these entries can be drawn.
        """
        try:
            found = (
                [future.result() for future in self._begun]
                if self._pool is not None
                else [_drawn(task, self._kinds) for task in self._tasks]
            )
        except BrokenProcessPool as error:
            raise LaunchError(
                f"A process that drew pictures of {self._cases} cases was ended from outside, perhaps for memory; none was written. Draw fewer cases: --case."
            ) from error
        pictures = {
            self._folder / f"{task.name}.{kind}": content
            for task, drawn in zip(self._tasks, found, strict=True)
            for kind, content in drawn.items()
        }
        if not pictures:
            raise SpecError(f"None of {self._cases} cases has a number that a picture could show.")
        return pictures


def _tasks(entries: Sequence[Entry]) -> list[_Task]:
    machines = dict.fromkeys(entry.machine for entry in entries)
    return [
        _Task(
            name if len(machines) == 1 else f"{machine}-{name}",
            name,
            [entry for entry in entries if entry.machine == machine and entry.metrics],
        )
        for machine in machines
        for name in PLOTS
    ]


_taken: tuple[Sequence[_Task], Sequence[str]] = ((), ())
"""In a worker process: what it was forked to draw."""


def _take(tasks: Sequence[_Task], kinds: Sequence[str], begin: Callable[[], None]) -> None:
    """In a worker process, first of all."""
    global _taken
    begin()
    _taken = tasks, kinds
    gc.freeze()  # what was forked stays; figures are cycles, and are collected
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to hear


def _draw_taken(number: int) -> dict[str, bytes]:
    tasks, kinds = _taken
    return _drawn(tasks[number], kinds)


def _drawn(task: _Task, kinds: Sequence[str]) -> dict[str, bytes]:
    """The picture by kind; {} where the entries hold nothing for it."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(rc()):
        figure = Figure(dpi=DOTS_PER_INCH, layout="constrained")
        if not task.entries or not PLOTS[task.plot](figure, task.entries):
            return {}
        settle(figure, task.entries)
        found = {}
        for kind in kinds:
            stream = io.BytesIO()
            # Without a date the same records give the same bytes.
            metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {}
            figure.savefig(stream, format=kind, metadata=metadata)
            found[kind] = stream.getvalue()
        return found
