"""Try every injected fault and its no-op twin, and say which the gate catches.

A fault is caught when one of the metrics or facts that it names turns red; a twin, whose patch is in place and does no harm,
must pass. A fault whose code never ran, or that passes, is a failure of ours. Both are judged against the accepted baselines,
or against a clean run of the same case in the same session, which needs none.
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
from hpc_core.baselines.lookup import find
from hpc_core.case.case import Case
from hpc_core.case.errors import BaselineError
from hpc_core.catalogue import TINY, TRIAL, WHOLE
from hpc_core.faults.catalogue import FAULTS
from hpc_core.faults.fault import TWIN, Fault
from hpc_core.gate.judge import judge
from hpc_core.gate.verdict import Judgement, Verdict
from hpc_core.launch.launcher import Launcher
from hpc_core.record.job import Event, Job, Kind, Measure, Predict
from hpc_core.record.record import Metric, Record

__all__ = ["NO_TWIN", "Against", "Trial", "run_trials", "trial_cases"]

Against = Literal["baselines", "clean"]
"""What a trial is judged against: what is accepted on disk, or a clean run of the same case in the same session."""

NO_TWIN = "not run"
_FOUR_LAYERS = "-4-layers"


def trial_cases(scale: Literal["tiny", "full", "whole"]) -> dict[str, Case]:
    """The cases that faults are tried on, by variant: tiny ones, short full-width ones for a GPU, whole ones for a prediction."""
    cases = {"tiny": TINY, "full": TRIAL, "whole": WHOLE}[scale]
    return {case.id.partition("/")[2].removesuffix(_FOUR_LAYERS): case for case in cases}


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One fault tried: what turned red, and what its twin did."""

    fault: Fault
    case: str
    red: tuple[str, ...]
    """Metrics that regressed and facts that do not hold."""
    verdict: str
    headline: str = ""
    twin: str
    """The twin's verdict; anything but PASS is a false alarm, and then with its headline. `NO_TWIN` if it was not run."""
    predicted: bool = False
    """Whether nothing ran, and all of it was predicted."""
    memory: bool = False
    """Whether only bytes count as having caught it."""
    shown: str = ""
    """Of a fault that no single run can be judged for: the first number that it should show in, twin and fault."""

    @property
    def must_show_in(self) -> tuple[str, ...]:
        """Of what at least one must turn red on this path."""
        names = self.fault.predicted if self.predicted else self.fault.shows_in
        return tuple(name for name in names if name.endswith("_bytes")) if self.memory else names

    @property
    def caught_by(self) -> tuple[str, ...]:
        """Those of the red ones that the fault names."""
        return tuple(name for name in self.red if any(fnmatchcase(name, pattern) for pattern in self.must_show_in))

    @property
    def no_alarm(self) -> bool:
        """Whether the twin, if it ran, passed."""
        return self.twin in ("PASS", NO_TWIN)

    @property
    def outcome(self) -> str:
        """One of "caught", "MISSED" (a false alarm of the twin is one too), and what a verdict would need: "needs A/B"."""
        if not self.no_alarm:
            return "MISSED"
        if self.caught_by:
            return "caught"
        if self.fault.needs is not None and not self.red:
            return f"needs {self.fault.needs}"
        return "MISSED"

    @property
    def good(self) -> bool:
        """Caught by what it should be caught by, or known not to be yet; and no false alarm."""
        return self.outcome != "MISSED"

    def line(self) -> str:
        """For the terminal, while the trials run."""
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
    """Run each fault and its twin, one fresh process each, `jobs` at a time; the trials in the order of the names.

    Args:
        names: of faults.
        cases: by variant.
        tell: hears a line for each trial as it ends.
        against: "clean" runs each case once without a fault first.
        baselines: folder of the accepted ones.
        jobs: with more than one, workers share the device: time on it is then left out of every judgement.
        predict: a kind of GPU; then faults, twins and clean runs are predicted for it, and none is needed.
        memory: only bytes count as having caught a fault, and no twin is run.

    Raises:
        LaunchError: no worker can be started at all.
        KeyboardInterrupt: after the workers are gone.
    """
    chosen = {name: cases[FAULTS[name].variant] for name in names}
    stop = threading.Event()

    def heard(_: Case, __: Event) -> None:
        if stop.is_set():
            raise KeyboardInterrupt  # ends this thread's worker

    with Launcher("warm", predicting=predict is not None, on_event=heard) as launcher, ThreadPoolExecutor(jobs) as pool:
        launcher.prepare()
        try:
            bench = _Bench(launcher, baselines, alone=jobs == 1, predict=predict, memory=memory)
            if against == "clean":
                # First in the queue, so that no trial waits for a run that waits for a thread.
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
    """Runs one case after another in any thread, and judges them by one rule."""

    def __init__(
        self, launcher: Launcher, baselines: Path, *, alone: bool, predict: str | None = None, memory: bool = False
    ):
        self._launcher = launcher
        self._memory = memory
        self._kind: Kind = Measure(profile=False) if predict is None else Predict(gpu=predict, profile=False)
        self._baselines = baselines
        self._alone = alone
        self.clean: dict[str, Future[Lookup]] = {}

    def run_clean(self, case: Case) -> Lookup:
        """A run without a fault, in a baseline's place."""
        record = self._launcher.run(Job(case=case, kind=self._kind))
        try:
            return unstored(record, reason="a clean run of the same session")
        except BaselineError as error:
            return Damaged(path=f"the clean run of {case.id}", reason=str(error))

    def trial(self, fault: Fault, case: Case) -> Trial:
        """The fault and its twin; of a whole model's memory the fault alone, since short models try the twins in less time."""
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
        lookup = self._lookup(case, record)
        if not self._alone:
            record = msgspec.structs.replace(record, metrics=_without_busy(record.metrics))
            if isinstance(lookup, Baseline):
                lookup = msgspec.structs.replace(lookup, metrics=_without_busy(lookup.metrics))
        return record, judge(record, lookup)

    def _lookup(self, case: Case, record: Record) -> Lookup:
        if case.id in self.clean:
            return self.clean[case.id].result()
        return find(self._baselines, record.circumstances.machine.key, case.id)


def _without_busy(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """All but time on the device, which several workers at once lengthen. Bytes and counts they do not touch."""
    return {name: metric for name, metric in metrics.items() if metric.noise != "busy"}


def _red(record: Record, judgement: Judgement) -> tuple[str, ...]:
    facts = [name for name, fact in record.audit.items() if not fact.holds]
    metrics = [row.metric for row in judgement.metrics if row.verdict is Verdict.REGRESSED]
    return tuple(facts + metrics)


def _shown(fault: Fault, twin: Record, record: Record) -> str:
    """What the eye sees and the gate does not judge."""
    for name in fault.shows_in:
        before, after = twin.metrics.get(name), record.metrics.get(name)
        if before is not None and after is not None:
            return f"{name} {before.value:.4g} → {after.value:.4g} {after.unit}, shown and not gated"
    return f"none of {', '.join(fault.shows_in)} was measured"
