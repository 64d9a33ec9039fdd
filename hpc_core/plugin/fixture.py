"""The fixtures: `perf` runs a case and ends the test by its verdict; `perf_session` is for tests of several records.

Wall samples reach pytest-benchmark through its public API: a timer that replays them, and `pedantic`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from hpc_core.case.case import Case
from hpc_core.case.errors import BuildError, LaunchError, RecordError, SpecError
from hpc_core.case.limits import Limits
from hpc_core.case.workloads import CallableSpec
from hpc_core.plugin.cases import case_id_of, predicted_gpu
from hpc_core.plugin.outcome import Outcome, outcome_of, properties
from hpc_core.plugin.runner import Runner
from hpc_core.record.environment import visible_gpus
from hpc_core.record.job import Job
from hpc_core.record.record import Record
from hpc_core.report.command import Command
from hpc_core.report.entry import Row

OUTCOME = pytest.StashKey[Outcome]()
"""The outcome of the test, once its case has run."""
CALLED = pytest.StashKey[bool]()
"""There once the test itself has ended; what remains are teardowns."""
_DEFAULT_STEPS = 10


class Perf:
    """The fixture `perf`."""

    def __init__(self, item: pytest.Item, benchmark: Any, runner: Runner, *, strict: bool, command: Command) -> None:
        self._item = item
        # Others define a `benchmark` too, and pytest-codspeed's claims to be pytest-benchmark's for isinstance().
        self._benchmark = benchmark if issubclass(type(benchmark), BenchmarkFixture) else None
        self._runner = runner
        self._strict = strict
        self._command = command
        self._used = False

    def __call__(
        self,
        what: Case | str | Callable[[], Any],
        *,
        limits: Limits | None = None,
        steps: int = _DEFAULT_STEPS,
        timeout_s: float = 300.0,
        device: Literal["any", "cuda"] = "any",
        arguments: dict[str, Any] | None = None,
        judge: bool = True,
        **named: Any,
    ) -> Record:
        """Run a case and judge it against its baseline.

        Args:
            what: a `Case`; "package.module:factory", which is called in a fresh process with the arguments and returns the
                step; or a callable, which is measured in this process.
            limits: limits of this case; they replace those of a `Case`.
            steps: how many steps of a factory or callable are timed.
            timeout_s: wall-clock seconds for a factory's case.
            device: "cuda" for a factory that needs a GPU. Without one, the test is skipped.
            arguments: arguments of the factory whose names clash with those above.
            judge: False for a test that relies on its own assertions: no baseline is read or written. A broken or invalid run
                still fails.
            **named: further arguments of the factory, as JSON values.

        Returns:
            The record, as in `record.metrics["peak_bytes"].value`. If there is nothing to compare with, the test goes on and
            is skipped at its end. In a teardown it is skipped at once.
        """
        __tracebackhide__ = True
        if self._used:
            pytest.fail("perf() was called twice in one test: a test is one case. Parametrize it.", pytrace=False)
        self._used = True
        earlier = self._item.stash.get(OUTCOME, None)
        if earlier is not None and earlier.kind == "worse":
            earlier.apply()  # another plugin runs the test again: that excuses no regression
        given = (arguments or {}) | named
        try:
            if not judge and limits is not None:
                raise SpecError("perf(judge=False) ignores limits=. Drop one of the two.")
            if isinstance(what, Case):
                case = _with_limits(what, limits, given)
            else:
                case = self._own_case(what, given, limits=limits, steps=steps, timeout_s=timeout_s, device=device)
        except SpecError as error:
            pytest.fail(str(error), pytrace=False)
        gpu = predicted_gpu(self._item)
        if gpu is None and case.needs_gpu and not visible_gpus():
            pytest.skip("needs a CUDA GPU: none is visible")
        try:
            row = self._run(case, what, gpu, judge=judge)
        except (BuildError, LaunchError, RecordError) as error:
            self._end(
                Outcome(result="failed", kind="broken", text=f"{case.id}: {error}\nRun it again: {self._command.run}")
            )
            raise
        self._report(row)
        outcome = outcome_of(row, strict=self._strict, command=self._command)
        # If sound numbers merely cannot be compared, the test's own assertions come first.
        self._end(outcome, can_wait=row.record.status == "ok" and outcome.kind == "not comparable")
        return row.record

    def _run(self, case: Case, what: Case | str | Callable[[], Any], gpu: str | None, *, judge: bool) -> Row:
        try:
            if gpu is not None:
                return self._runner.predict(case, gpu, self._command, judge=judge)
            if callable(what):
                return self._runner.run_bare(case, what, self._command, judge=judge)
            return self._runner.run(case, self._command, judge=judge)
        except KeyboardInterrupt:
            # pytest tears this test down without its warning filters, and pytest-benchmark would warn that it was unused.
            if self._benchmark is not None:
                self._benchmark.skipped = True
            raise

    def _own_case(
        self,
        what: str | Callable[[], Any],
        arguments: dict[str, Any],
        *,
        limits: Limits | None,
        steps: int,
        timeout_s: float,
        device: Any,
    ) -> Case:
        if callable(what) and (arguments or _needed(what)):
            raise SpecError(
                "A bare callable takes no arguments. Name a factory instead: perf('package.module:factory', batch=4)."
            )
        factory = what if isinstance(what, str) else self._name_of_test()
        workload = CallableSpec(factory=factory, arguments=arguments, steps=steps, device=device)
        return Case(
            id=case_id_of(self._item),
            scale="full" if device == "cuda" else "tiny",
            workload=workload,
            timeout_s=timeout_s,
            limits=limits or Limits(),
        )

    def _name_of_test(self) -> str:
        """Return the test's name for a bare callable, which has no importable name."""
        name = getattr(self._item, "originalname", None) or "test"
        return f"{''.join(c if c.isalnum() else '_' for c in self._item.path.stem)}:{name}"

    def _report(self, row: Row) -> None:
        self._item.user_properties += properties(row)
        if self._benchmark is None:
            return
        self._benchmark.extra_info["record"] = _extra(row)
        if row.record.status == "ok":  # numbers of an invalid run enter no table
            replay(self._item, self._benchmark, row.record.wall_samples)

    def _end(self, outcome: Outcome, *, can_wait: bool = False) -> None:
        __tracebackhide__ = True
        self._item.stash[OUTCOME] = outcome
        if not can_wait or CALLED in self._item.stash:
            outcome.apply()


def _needed(step: Callable[[], Any]) -> Sequence[str]:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):  # builtins have none
        return ()
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is each.empty and each.kind not in free]


def _with_limits(case: Case, limits: Limits | None, arguments: dict[str, Any]) -> Case:
    if arguments:
        raise SpecError(
            f"{case.id} is a complete case: use case.vary() instead of passing perf() {', '.join(arguments)}."
        )
    if limits is None:
        return case
    return type(case)(**{name: getattr(case, name) for name in case.__struct_fields__} | {"limits": limits})


def _extra(row: Row) -> dict[str, Any]:
    """Return what pytest-benchmark's JSON holds in addition to its statistics."""
    judgement, circumstances = row.judgement, row.record.circumstances
    metrics = {} if row.record.status != "ok" else row.record.metrics
    return {
        "case": row.case,
        "digest": row.record.case.digest,
        "status": row.record.status,
        "verdict": row.verdict,
        "machine": circumstances.machine.key,
        "stack": dict(circumstances.stack),
        "settings": circumstances.settings,
        "suspects": [] if judgement is None else list(judgement.moved),
        "metrics": {name: {"value": metric.value, "unit": metric.unit} for name, metric in metrics.items()},
        "verdicts": {} if judgement is None else {each.metric: str(each.verdict) for each in judgement.metrics},
        # The whole record, so that `hpc-core report` needs no other file.
        "record": msgspec.to_builtins(row.record),
    }


class PerfSession:
    """The fixture `perf_session`."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.jobs = 0
        """How many jobs were run."""
        self.shown: list[tuple[str, str]] = []
        """Sections for the end of the run, as (title, text)."""

    @property
    def records(self) -> Mapping[str, Record]:
        """The sound records of this session, by case id."""
        return {row.case: row.record for row in self._runner.rows if row.record.status == "ok"}

    def run(self, job: Job) -> Record:
        """Run a job in a process of its own, and neither judge nor list it.

        Raises:
            LaunchError: no worker can be started at all.
        """
        self.jobs += 1
        return self._runner.run_unjudged(job)

    def show(self, title: str, text: str) -> None:
        """Print a section below the table that ends the run."""
        self.shown.append((title, text))


_TIMER = pytest.StashKey["ReplayTimer"]()


class ReplayTimer:
    """A timer that replays recorded durations: it reads 0, the first sample, 0, the second sample, and so on."""

    __name__ = "replayed"  # pytest-benchmark prints a timer's name

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, samples: Sequence[float]) -> None:
        """Replay these durations next."""
        self._readings = iter([reading for sample in samples for reading in (0.0, sample)])

    def __call__(self) -> float:
        """Return the next reading; 0 after the last."""
        return next(self._readings, 0.0)


def with_timer(item: pytest.Item, group: str) -> None:
    """Give a test its replaying timer, and its group unless its author has outcome one."""
    timer = item.stash[_TIMER] = ReplayTimer()
    own = item.get_closest_marker("benchmark")
    arguments = {"group": group} | ({} if own is None else dict(own.kwargs))
    # pytest-benchmark reads only the closest marker, so it also carries the author's arguments.
    item.add_marker(pytest.mark.benchmark(**(arguments | {"timer": timer})), append=False)


def replay(item: pytest.Item, benchmark: Any, samples: Sequence[float]) -> None:
    """Make these samples the rounds of this test's benchmark. Do nothing if pytest-benchmark is disabled."""
    if samples and benchmark.enabled:
        item.stash[_TIMER].load(samples)
        benchmark.pedantic(_nothing, rounds=len(samples))


def _nothing() -> None:
    """The function that pytest-benchmark times."""
