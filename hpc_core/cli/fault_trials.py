"""Try injected faults and their no-op twins, and report which ones the gate catches.

A fault is caught when one of the metrics or facts that it names turns red. Its twin replaces the same function without harm and
must pass. Both are judged against the accepted baselines, or against a clean run of the same case in the same session.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import msgspec

from hpc_core.baselines.accept import unstored
from hpc_core.baselines.baseline import Baseline, Damaged, Lookup
from hpc_core.baselines.history import sessions
from hpc_core.baselines.lookup import find
from hpc_core.case.case import Case
from hpc_core.case.errors import BaselineError
from hpc_core.catalogue import TINY, TRIAL, WHOLE
from hpc_core.faults.catalogue import FAULTS
from hpc_core.faults.fault import TWIN, Fault
from hpc_core.gate.busy import Sessions, sessions_of_regime
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Event, Job, Kind, Measure, Predict
from hpc_core.record.record import Metric, Record
from hpc_core.record.repeats import values_of_processes

Against = Literal["baselines", "clean"]
"""What a trial is judged against: accepted baselines, or a clean run in the same session."""

NO_TWIN = "not run"
_FOUR_LAYERS = "-4-layers"


def trial_cases(scale: Literal["tiny", "full", "whole"]) -> dict[str, Case]:
    """Return the cases that faults are tried on, by variant: tiny, full width with four layers (GPU), or whole (prediction)."""
    cases = {"tiny": TINY, "full": TRIAL, "whole": WHOLE}[scale]
    return {case.id.partition("/")[2].removesuffix(_FOUR_LAYERS): case for case in cases}


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one fault: what turned red, and the verdict of its twin."""

    fault: Fault
    case: str
    red: tuple[str, ...]
    """Metrics that regressed and facts that do not hold."""
    verdict: str
    headline: str = ""
    twin: str
    """The twin's verdict, or `NO_TWIN`. Anything but PASS is a false alarm and carries its headline."""
    predicted: bool = False
    """Whether it was predicted instead of run."""
    memory: bool = False
    """Whether only metrics in bytes count."""
    shown: str = ""
    """For a fault that needs an A/B: the first number that it should change, for twin and fault."""

    @property
    def must_show_in(self) -> tuple[str, ...]:
        """What must turn red here, at least one of them."""
        names = self.fault.predicted if self.predicted else self.fault.shows_in
        return tuple(name for name in names if name.endswith("_bytes")) if self.memory else names

    @property
    def caught_by(self) -> tuple[str, ...]:
        """What turned red and is named by the fault."""
        return tuple(name for name in self.red if any(fnmatchcase(name, pattern) for pattern in self.must_show_in))

    @property
    def no_alarm(self) -> bool:
        """Whether the twin passed or did not run."""
        return self.twin in ("PASS", NO_TWIN)

    @property
    def outcome(self) -> str:
        """Return "caught", "MISSED" (also for a false alarm of the twin), or what a verdict needs: "needs A/B"."""
        if not self.no_alarm:
            return "MISSED"
        if self.caught_by:
            return "caught"
        if self.fault.needs is not None and not self.red:
            return f"needs {self.fault.needs}"
        return "MISSED"

    @property
    def good(self) -> bool:
        """Whether it was not missed."""
        return self.outcome != "MISSED"

    def line(self) -> str:
        """Return one line for the terminal."""
        return f"{self.outcome:<9} {self.fault.name:<22} {self.case:<34} {self._why()}"

    def _why(self) -> str:
        if not self.no_alarm:
            return f"its twin is not green: {self.twin}"
        if self.outcome == "caught":
            return f"{self.verdict} by {', '.join(self.caught_by[:3])}"
        if self.good:
            return f"{self.verdict}; {self.shown}"
        others = f"; red: {', '.join(self.red)}" if self.red else ""
        return f"{self.verdict}, should show in {' or '.join(self.must_show_in)}{others}: {self.headline}"


def run_trials(
    names: Iterable[str],
    *,
    cases: Mapping[str, Case],
    tell: Callable[[str], None],
    against: Against = "baselines",
    baselines: Path = Path("baselines"),
    jobs: int = 1,
    predict: str | None = None,
    memory: bool = False,
) -> list[Trial]:
    """Run each fault and its twin in fresh processes, `jobs` at a time. Return the trials in the order of the names.

    Args:
        names: of faults.
        cases: by variant.
        tell: called with a line for each finished trial.
        against: with "clean", each case first runs once without a fault.
        baselines: folder of the accepted baselines.
        jobs: with more than one, workers share the machine, so no time is judged.
        predict: name of a GPU to predict everything for, instead of running it.
        memory: only metrics in bytes count, and no twins run.

    Raises:
        LaunchError: no worker can be started at all.
        KeyboardInterrupt: after the workers are gone.
    """
    chosen = {name: cases[FAULTS[name].variant] for name in names}
    stop = threading.Event()

    def on_event(_: Case, __: Event) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # ends this thread's worker

    with (
        Launcher("warm", predicting=predict is not None, on_event=on_event) as launcher,
        ThreadPoolExecutor(jobs) as pool,
    ):
        launcher.prepare()
        try:
            bench = _Bench(launcher, baselines, alone=jobs == 1, predict=predict, memory=memory)
            if against == "clean":
                # Clean runs enter the queue first: a trial that waits for one must not hold the last thread.
                bench.clean = {case.id: pool.submit(bench.run_clean, case) for case in chosen.values()}
            trials = {pool.submit(bench.trial, FAULTS[name], case): name for name, case in chosen.items()}
            done = {}
            for future in as_completed(trials):
                done[trials[future]] = future.result()
                tell(future.result().line())
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [done[name] for name in chosen]


class _Bench:
    """Run cases in any thread, and judge them all by the same rule."""

    def __init__(
        self, launcher: Launcher, baselines: Path, *, alone: bool, predict: str | None = None, memory: bool = False
    ):
        self._launcher = launcher
        self._memory = memory
        self._kind: Kind = Measure(profile=False) if predict is None else Predict(gpu=predict, profile=False)
        self._baselines = baselines
        self._alone = alone
        self.clean: dict[str, Future[tuple[Lookup, Sessions]]] = {}

    def run_clean(self, case: Case) -> tuple[Lookup, Sessions]:
        """Run without a fault, to take the place of a baseline and of its only session."""
        record = self._launcher.run(Job(case=case, kind=self._kind))
        try:
            lookup = unstored(record, reason="a clean run of the same session")
        except BaselineError as error:
            return Damaged(path=f"the clean run of {case.id}", reason=str(error)), {}
        return lookup, {name: [values] for name, values in values_of_processes(record).items()}

    def trial(self, fault: Fault, case: Case) -> Trial:
        """Try a fault and its twin. For whole models only the fault: short models try the twins in less time."""
        record, judgement = self._judged(case, fault.name)
        if self._memory:
            return self._trial(fault, case, record, judgement, twin=NO_TWIN)
        twin_record, twin = self._judged(case, fault.name + TWIN)
        passed = str(twin.verdict) if twin.verdict is Verdict.PASS else f"{twin.verdict}: {twin.headline}"
        shown = "" if fault.needs is None else _shown(fault, twin_record, record)
        return self._trial(fault, case, record, judgement, twin=passed, shown=shown)

    def _trial(
        self, fault: Fault, case: Case, record: Record, judgement: Judgement, *, twin: str, shown: str = ""
    ) -> Trial:
        return Trial(
            fault=fault,
            case=case.id,
            predicted=isinstance(self._kind, Predict),
            memory=self._memory,
            red=_red(record, judgement),
            verdict=str(judgement.verdict),
            headline=judgement.headline,
            twin=twin,
            shown=shown,
        )

    def _judged(self, case: Case, fault: str) -> tuple[Record, Judgement]:
        record = self._launcher.run(Job(case=case, kind=self._kind, fault=fault))
        lookup, known = self._accepted(case, record)
        if not self._alone:
            record = msgspec.structs.replace(record, metrics=_without_busy(record.metrics))
            if isinstance(lookup, Baseline):
                lookup = msgspec.structs.replace(lookup, metrics=_without_busy(lookup.metrics))
        return record, judge(record, lookup, sessions=known)

    def _accepted(self, case: Case, record: Record) -> tuple[Lookup, Sessions]:
        if case.id in self.clean:
            return self.clean[case.id].result()
        key = record.circumstances.machine.key
        lookup = find(self._baselines, key, case.id)
        if not isinstance(lookup, Baseline):
            return lookup, {}
        accepted = [each.metrics for each in sessions(self._baselines, key, case.id, digest=case.digest)]
        return lookup, sessions_of_regime(accepted, lookup.metrics)


def _without_busy(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """Drop GPU-busy time and energy, which several workers at once change. They do not change bytes and counts."""
    return {name: metric for name, metric in metrics.items() if metric.noise == "exact" or not metric.gated}


def _red(record: Record, judgement: Judgement) -> tuple[str, ...]:
    facts = [name for name, fact in record.audit.items() if not fact.holds]
    metrics = [row.metric for row in judgement.metrics if row.verdict is Verdict.REGRESSED]
    return tuple(facts + metrics)


def _shown(fault: Fault, twin: Record, record: Record) -> str:
    """Return the first number that the fault should change, before and after."""
    for name in fault.shows_in:
        before, after = twin.metrics.get(name), record.metrics.get(name)
        if before is not None and after is not None:
            return f"{name} {before.value:.4g} → {after.value:.4g} {after.unit}, not judged here"
    return f"none of {', '.join(fault.shows_in)} was measured"


def summary(trials: list[Trial], seconds: float) -> str:
    """Return one line for all trials, and the names of what needs an A/B or was missed."""
    waiting = [trial for trial in trials if trial.outcome.startswith("needs")]
    missed = [trial.fault.name for trial in trials if not trial.good]
    judged = len(trials) - len(waiting)
    alarms = sum(not trial.no_alarm for trial in trials)
    untried = all(trial.twin == NO_TWIN for trial in trials)
    twins = (
        "twins not run" if untried else "twins green" if not alarms else f"{alarms} of {len(trials)} twins not green"
    )
    lines = [f"{judged - len(missed)} of {judged} faults caught, {twins}, {seconds:.0f} s"]
    lines += [f"Not judged here: {trial.fault.name} {trial.outcome}" for trial in waiting]
    if missed:
        lines.append(f"MISSED: {', '.join(missed)}")
    return "\n".join(lines)


def markdown(trials: list[Trial]) -> str:
    """Return a Markdown table."""
    lines = ["| fault | what it does | seen on | case | verdict | caught by | twin |", "|---|---|---|---|---|---|---|"]
    for trial in trials:
        named = ", ".join(f"`{name}`" for name in trial.caught_by)
        on = trial.fault.seen_on if trial.fault.needs is None else "neither"
        by = named if trial.outcome == "caught" else f"**{trial.outcome.replace('MISSED', 'missed')}**"
        lines.append(
            f"| `{trial.fault.name}` | {trial.fault.summary} | {on} | `{trial.case}` | {trial.verdict} | {by} | {trial.twin} |"
        )
    return "\n".join(lines)
