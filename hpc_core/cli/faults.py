"""Try every injected fault and its no-op twin against the accepted baselines, and say which the gate catches.

A fault is caught when one of the metrics or facts that it names turns red; a twin, whose patch is in place and does no harm,
must pass. A fault whose code never ran, or that passes, is a failure of ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import msgspec

from hpc_core.cases import catalogue
from hpc_core.faults import FAULTS, TWIN, Fault
from hpc_core.gate import Judgement, Verdict, judge
from hpc_core.launch.launcher import Launcher
from hpc_core.launch.protocol import Job
from hpc_core.record import Record
from hpc_core.spec import Case
from hpc_core.store import find

__all__ = ["Trial", "markdown", "run_trials", "table"]

_SHAPES = {"tiny": "tiny", "full": "llama-3.2-3b"}


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """One fault tried: what turned red, and what its twin did."""

    fault: Fault
    case: str
    red: tuple[str, ...]
    """Metrics that regressed and facts that do not hold."""
    verdict: str
    twin: str
    """The twin's verdict; anything but PASS is a false alarm, and then with its headline."""
    seconds: float

    @property
    def caught_by(self) -> tuple[str, ...]:
        """Those of the red ones that the fault names."""
        return tuple(name for name in self.red if any(fnmatchcase(name, pattern) for pattern in self.fault.shows_in))

    @property
    def good(self) -> bool:
        """Caught by what it should be caught by, and no false alarm."""
        return bool(self.caught_by) and self.twin == "PASS"


def run_trials(
    names: Iterable[str], *, scale: str, baselines: Path, tell: Callable[[str], None], launcher: Launcher
) -> list[Trial]:
    """Run each fault and its twin, one fresh process each."""
    cases, trials = catalogue(), []
    for name in names:
        fault = FAULTS[name]
        case = cases[f"{_SHAPES[scale]}/{fault.variant}"]
        began = time.monotonic()
        record, judgement = _run(launcher, case, name, baselines)
        _, twin = _run(launcher, case, name + TWIN, baselines)
        said = str(twin.verdict) if twin.verdict is Verdict.PASS else f"{twin.verdict}: {twin.headline}"
        trial = Trial(
            fault=fault,
            case=case.id,
            red=_red(record, judgement),
            verdict=str(judgement.verdict),
            twin=said,
            seconds=time.monotonic() - began,
        )
        trials.append(trial)
        tell(f"{'caught' if trial.good else 'MISSED':<7} {name:<22} {case.id:<24} {_why(trial, judgement)}")
    return trials


def _run(launcher: Launcher, case: Case, fault: str, baselines: Path) -> tuple[Record, Judgement]:
    record = launcher.run(Job(case=case, fault=fault))
    return record, judge(record, find(baselines, record.circumstances.machine.key, case.id))


def _red(record: Record, judgement: Judgement) -> tuple[str, ...]:
    facts = [name for name, fact in record.audit.items() if not fact.holds]
    metrics = [row.metric for row in judgement.metrics if row.verdict is Verdict.REGRESSED]
    return tuple(facts + metrics)


def _why(trial: Trial, judgement: Judgement) -> str:
    if not trial.caught_by:
        others = f"; red: {', '.join(trial.red)}" if trial.red else ""
        return f"{trial.verdict}, should show in {' or '.join(trial.fault.shows_in)}{others}: {judgement.headline}"
    if trial.twin != "PASS":
        return f"its twin is not green: {trial.twin}"
    return f"{trial.verdict} by {', '.join(trial.caught_by[:3])}"


def table(trials: list[Trial]) -> str:
    """One line for the whole, and what was missed."""
    missed = [trial.fault.name for trial in trials if not trial.good]
    caught = f"{len(trials) - len(missed)} of {len(trials)} faults caught, twins green, {sum(t.seconds for t in trials):.0f} s"
    return caught if not missed else f"{caught}\nMISSED: {', '.join(missed)}"


def markdown(trials: list[Trial]) -> str:
    """The table for docs/faults.md."""
    lines = ["| fault | what it does | case | verdict | caught by | twin |", "|---|---|---|---|---|---|"]
    for trial in trials:
        by = ", ".join(f"`{name}`" for name in trial.caught_by) or "**missed**"
        lines.append(
            f"| `{trial.fault.name}` | {trial.fault.summary} | `{trial.case}` | {trial.verdict} | {by} | {trial.twin} |"
        )
    return "\n".join(lines)
